"""Measurements. Nothing in here asserts a time: figures depend on the machine."""
