"""The one exception that speaks to the user."""


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and what to do. The command line prints it and exits with 2."""
