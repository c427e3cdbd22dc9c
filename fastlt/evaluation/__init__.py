"""From a model to figures."""
