"""`fastlt bench-loss`."""
