"""From the names of target classes to auxiliary classes and their images: propose -> retrieve ->
filter.
"""
