"""A trained model on a local page: photos in, answers out, corrections kept as a dataset."""
