"""Train policies: the DeepSpeed engine, the schedules, and the GRPO and SFT trainers on top of them."""
