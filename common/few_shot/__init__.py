"""Few-shot learners on frozen features: baselines, and ALERT's drafts.

encoders/ makes features of pictures and class names, heads/ holds the learners, features.py brings both together, and
learner.py is what a run trains and tests.
"""
