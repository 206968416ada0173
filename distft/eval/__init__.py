"""`distft eval`: a model of a run, or of a recipe, is looked at: held-out loss, answers, tasks of lm-eval."""
