"""Adapters as changes of weights: merged into their base, combined, compared, extracted, resized, converted."""
