"""Tests on real mounts."""
