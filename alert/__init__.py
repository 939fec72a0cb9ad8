"""ALERT: few-shot classification with trainable category embeddings, reference categories and GRPO."""
