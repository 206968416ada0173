"""Words every room shares: batches, reports, errors, registries, the log."""
