"""What every room may use: files, locks, signals, names, progress."""
