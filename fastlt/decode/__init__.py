"""Decode images: whole ones by Pillow, regions of JPEGs by compiled code."""
