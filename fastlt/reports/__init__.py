"""Pages and charts of runs and sweeps."""
