"""Estimate the memory, operations and time of a training before it runs."""
