"""Sampling with vLLM, an engine of its own in every rank: conf/rollout/vllm.yaml."""
