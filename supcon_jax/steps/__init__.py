"""One update of each stage, as pure functions of state and batch."""
