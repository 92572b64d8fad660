"""Named branches of a directory: try a command on one, look at its changes, commit or discard them."""
