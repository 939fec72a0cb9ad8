"""Tiny models for laptops and tests, pre-trained from scratch on rendered images."""
