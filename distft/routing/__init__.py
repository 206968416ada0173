"""A small classifier that chooses among adapters of one base, request by request."""
