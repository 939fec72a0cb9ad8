"""What every process of a run stands on: ranks, progress bars, Ctrl-C, UTF-8, a cache on disk."""
