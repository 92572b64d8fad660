"""Settings: plain values and their parsing. Asks nothing of the host."""
