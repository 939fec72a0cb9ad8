"""Datasets: reading them, few-shot picks, and the manifest that freezes both."""
