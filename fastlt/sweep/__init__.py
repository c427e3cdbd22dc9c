"""Many trainings that answer one question: which auxiliaries, how many, how strongly silenced.

On Ray Tune.
"""
