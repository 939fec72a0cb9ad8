"""Sampling backends behind one protocol: transformers (hf.py) and vLLM (vllm/)."""
