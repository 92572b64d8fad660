"""One mount as a process: its settings, start and end, and how others find it."""
