"""A trained model at work: new pictures in, names with probabilities and reasons out."""
