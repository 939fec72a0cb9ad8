"""Optimisation: the DeepSpeed engine, the schedule, and the trainers on top of them."""
