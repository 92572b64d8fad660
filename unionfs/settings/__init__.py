"""Settings: plain values and their parsing, independent of the host."""
