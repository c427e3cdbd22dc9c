"""The ffcv engine."""
