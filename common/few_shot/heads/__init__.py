"""The CLIP-based few-shot learners, one file each: its formula, its fit and what it searches (ALERT section 4.1).

They are baselines, and ALERT's drafts. Tensors of frozen features go in, logits come out: nothing here loads an
encoder, a dataset or a configuration.

Shapes, in all files: N images, C classes, K images per class that are kept, D features, P positions of an image's map,
V augmented views.
"""
