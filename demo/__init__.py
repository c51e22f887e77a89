"""The demonstration: the whole product with real processes, models, and keys (`make demo`)."""
