"""Prompts as tokens go in; completions or log-likelihoods come out, the same under every engine."""
