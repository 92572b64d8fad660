"""Running commands in a union: containers without an engine."""
