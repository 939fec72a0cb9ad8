"""Few-shot learners on frozen features: baselines, and the drafts of ALERT.

encoders/ computes features of images and class names, heads/ holds the learners, and learner.py joins both into what a
run trains and tests. candidates.py keeps a learner's best classes per image, for ALERT.
"""
