"""The base class of errors that wrong input causes."""


class UserError(ValueError):
    """Input from the user that cannot be used.

    The message names the file, key or value, says what was expected and what to do. The command line prints it alone,
    without a traceback.
    """
