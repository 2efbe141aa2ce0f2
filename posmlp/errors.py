"""The base of every error that wrong input causes."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message names the file, key or value, says what was expected and what to do; the command line prints it alone,
    without a traceback.
    """
