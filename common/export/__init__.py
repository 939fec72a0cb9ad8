"""Export of a finished run's model as a folder that plain transformers and vLLM load, with a model card."""
