"""Attacks by other users, containers, archives, plugins and layers, as tests."""
