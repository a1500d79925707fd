"""A run before its hardware is there: slices, operations, the time of a step, a verdict."""
