"""ALERT: few-shot classification with trainable category embeddings, a comparing prompt and GRPO."""
