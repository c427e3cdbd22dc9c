"""From images as people have them to a pack, and back."""
