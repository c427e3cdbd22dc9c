"""Measurements of fastlt, each with the command that made it in benchmarks/results."""
