"""One forward pass over prompts and their completions, every prompt computed once: to train, sample and score."""
