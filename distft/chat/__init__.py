"""`distft chat`: a trained model answers in the terminal, beside its base and other adapters."""
