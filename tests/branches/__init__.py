"""Branches: try, diff, commit, undo."""
