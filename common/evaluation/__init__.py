"""What a model answers on a split, and the numbers that say how good that is."""
