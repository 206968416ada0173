"""A run made again: is what it started from still the same, and does it end the same."""
