"""Local web page for a trained model: upload photos, see answers, save corrections as a dataset."""
