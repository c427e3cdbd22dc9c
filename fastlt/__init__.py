"""fastlt: long-tailed image classification with auxiliary classes and neighbour silencing."""
