"""Commands that train many times to answer one question."""
