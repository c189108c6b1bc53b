"""Fewer bits: in training, on demand, and in the cache."""
