"""Storage around a union's layers: volumes, bind mounts and tmpfs."""
