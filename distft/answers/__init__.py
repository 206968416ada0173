"""What a model answers: prompts in, text or likelihoods out, judged and kept, the same under every engine."""
