"""The volume plugin: docker and podman use the volumes of a storage root by Docker's protocol."""
