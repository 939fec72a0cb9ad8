"""Contrastive-reasoning reward: a language model judges the reasoning (ALERT section 3.5)."""

from alert.judge.reward import ContrastiveReasoning

__all__ = ["ContrastiveReasoning"]
