"""The configuration: its types, and what Hydra does not check."""
