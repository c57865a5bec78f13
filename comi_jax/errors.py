"""The base class of errors that a user can fix. Every message is one sentence: what, where, what to do."""


class UserError(ValueError):
    """Ends a command with its message and status 1, without a traceback (``cli.one_way_out``)."""
