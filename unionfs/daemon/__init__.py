"""One mount as a process: its settings, its start and end, and how others find it."""
