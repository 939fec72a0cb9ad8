"""The configuration: types, checks beyond those of Hydra, run names, and help with misspelt keys."""
