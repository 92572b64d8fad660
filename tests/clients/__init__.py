"""Real programs on a real mount."""
