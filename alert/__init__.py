"""ALERT: few-shot classification with trainable category embeddings and GRPO on a reasoning model."""
