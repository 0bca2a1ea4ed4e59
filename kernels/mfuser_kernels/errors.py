"""Errors of this package. Each message is one sentence a user can act on."""


class ScanError(ValueError):
    """An argument of `selective_scan` is wrong, or the backend asked for cannot run it."""
