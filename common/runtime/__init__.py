"""Basics of every process of a run: ranks, progress bars, Ctrl-C, UTF-8, a disk cache."""
