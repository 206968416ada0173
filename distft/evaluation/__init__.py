"""Evaluation sets go in with a generator; scored answers come out and are kept beside the run."""
