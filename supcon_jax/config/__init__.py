"""Keys of a config, what is allowed, what goes together, and where config files are."""
