"""CLIP-based few-shot learners, one file each: formula, fit and hyperparameter search (ALERT section 4.1).

They serve as baselines and as ALERT's drafts. They map tensors of frozen features to logits: nothing here loads an
encoder, a dataset or a configuration.

Shapes, in all files: N images, C classes, K kept images per class, D features, P positions of an image's map, V
augmented views.
"""
