"""`unionfs web`: pages that show mounts, volumes, containers and branches, and change nothing."""
