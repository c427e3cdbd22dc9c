"""The benchmark of `fastlt bench-data`."""
