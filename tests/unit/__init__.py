"""Tests that need no mount of the union."""
