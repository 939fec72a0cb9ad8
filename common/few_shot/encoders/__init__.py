"""Frozen features of pictures and class names: encoders, the views of a picture, and what is kept of them on disk.

Shapes: N pictures, B of them in a batch, S image side, D width of a feature, P positions of a map, T texts, C classes.
"""
