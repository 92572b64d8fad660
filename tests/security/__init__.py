"""What other users, containers, archives, plugins and layers must not get: attacks as tests."""
