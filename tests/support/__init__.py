"""What tests share: mounts, layer areas, workers with another identity, snapshots of trees."""
