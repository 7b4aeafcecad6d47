"""Exceptions that the command line turns into exit code 2 and one message."""


class UserError(Exception):
    """A mistake in a config, a file or an argument.

    The message says what is wrong, where (file and line, or config key), and what to do.
    """


class StepAbandoned(UserError):
    """A training step ended before its optimizer step; weights, optimizer, scheduler and teacher did not change."""
