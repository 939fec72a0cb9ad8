"""Evaluation of a model on splits: its answers, and metrics."""
