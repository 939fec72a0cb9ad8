"""CLS-RL and No-Thinking-CLS-RL (arXiv 2503.16188): few-shot classification by GRPO with rule-checked rewards."""
