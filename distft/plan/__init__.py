"""What is known before a run: memory per rank by component, whether it fits, what to change, how fast it will be.

From the recipe and the model's config alone: no weights, no GPU, no network, no rows.
"""
