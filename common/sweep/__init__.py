"""Sweeps: the points of a table or figure of a paper (sweeps/*.yaml), run, skipped if finished, and laid out."""
