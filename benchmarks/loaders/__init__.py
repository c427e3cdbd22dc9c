"""`fastlt bench-data`."""
