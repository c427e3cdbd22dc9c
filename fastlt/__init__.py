"""fastlt: long-tailed image classification with auxiliary classes and neighbour silencing."""

__version__ = "0.2.0"
