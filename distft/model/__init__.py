"""Weights to a trainable module: built on the meta device, filled straight into the place an engine gives them."""
