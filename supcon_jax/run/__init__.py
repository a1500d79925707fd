"""A run from its config to its end: plan, data, folder, and the loop of all training."""
