"""Engines: each turns the batches of a plan into images."""
