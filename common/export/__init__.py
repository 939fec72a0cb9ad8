"""A finished run's model for others: a folder that plain transformers and vLLM load, with a model card."""
