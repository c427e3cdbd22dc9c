"""Many trainings that answer one question: which auxiliaries, how many, how silenced.

On Ray Tune.
"""
