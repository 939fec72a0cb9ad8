"""Inference with a trained model: class names, probabilities and reasoning for new images."""
