"""The recipes that come with fastlt, one .toml file each."""
