"""Compute frozen features of images and class names, and keep them on disk.

Shapes: N images, B images in a batch, S side of an image, D width of a feature, P positions of a map, T texts, C
classes.
"""
