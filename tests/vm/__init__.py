"""Tests that need a machine of their own: scripts/vm-test runs them in a virtual one."""
