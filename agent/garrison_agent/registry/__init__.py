"""The board's signed model registry: trusted metadata, verified downloads, disk budget, choice of variant."""
