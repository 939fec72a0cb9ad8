"""A tiny Gemma 3 that runs ALERT on a laptop, pre-trained on rendered digits and garments."""
