"""The error that users can fix."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong and what to do."""
