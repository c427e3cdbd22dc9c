"""Backbones, heads, weights and exports."""
