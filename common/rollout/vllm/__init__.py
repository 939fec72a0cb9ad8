"""Sampling with vLLM, one engine per rank: conf/rollout/vllm.yaml."""
