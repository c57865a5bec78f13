"""Errors that a user can fix. Every message is one sentence: what, where, what to do."""


class UserError(ValueError):
    """Ends a command with its message and status 1, without a traceback (``cli.one_way_out``)."""


class ConfigError(UserError):
    """An unknown setting or an invalid value; the message names it and the valid ones."""
