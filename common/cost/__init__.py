"""What a training costs in memory, operations and time, before it runs."""
