"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Bad input: the message says what was wrong, with which value, and what to do.

    The command line prints it as a single line and exits with code 2.
    """
