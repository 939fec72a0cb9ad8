"""Sweeps: run the points of a paper's table or figure (sweeps/*.yaml), skip finished ones, and write a page."""
