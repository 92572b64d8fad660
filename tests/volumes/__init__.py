"""Tests of named volumes: the registry, drivers, and backups, by the command line and in the process."""
