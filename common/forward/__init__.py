"""Run prompts and completions in one forward pass that computes every prompt once: to train, sample and score."""
