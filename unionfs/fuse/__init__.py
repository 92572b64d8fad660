"""Serves a union: one ``Operations`` class and the sessions that drive it."""
