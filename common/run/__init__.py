"""A run as files and checks: its folder, checkpoints, result and tracker, and what is examined before it starts."""
