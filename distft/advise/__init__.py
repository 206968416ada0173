"""A few questions, then a recipe: prompt, retrieve or fine-tune; which method and settings; each with its reason."""
