"""The error that users can fix, and texts of other errors in messages."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong and what to do."""


def one_line(error: Exception) -> str:
    """Returns a library's error as part of a message: one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
