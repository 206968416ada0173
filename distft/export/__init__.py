"""Hand-over: what other programs load."""
