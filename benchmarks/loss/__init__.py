"""The benchmark of `fastlt bench-loss`."""
