"""Tests of named volumes: records, drivers, and backups, by the command line and in the process."""
