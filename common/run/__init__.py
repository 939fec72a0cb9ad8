"""Files and checks of a run: its folder, checkpoints, result and tracker, and checks before it starts."""
