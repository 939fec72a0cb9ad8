"""The CLIP-based few-shot learners: tensors of frozen features in, logits out. Each file holds one (ALERT section 4.1).

They are ALERT's drafts and its baselines. Nothing here loads an encoder, a dataset or a configuration.

Shapes, in all files: N images, C classes, K images per class that are kept, D features, P positions of an image's map,
V augmented views.
"""
