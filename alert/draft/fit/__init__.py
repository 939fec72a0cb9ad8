"""Few-shot learners on frozen features: fitted on shots, chosen by validation pictures, asked for logits.

The formulas are in alert/draft/learners/, the features in alert/draft/features/.
"""
