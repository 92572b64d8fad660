"""Named branches of a directory: try a command on one, look at its changes, commit them or throw them away."""
