"""The one exception for mistakes of the user's: the command line turns it into exit code 2 and one message."""


class UserError(Exception):
    """A mistake in a config, a file or an argument.

    The message says what is wrong, where (file and line, or config key), and what to do.
    """
