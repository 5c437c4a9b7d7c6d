"""The error that users can fix, and texts of other errors in messages."""

from __future__ import annotations

import re

# What XLA and the coordination service say of a process that is gone.
_LOST = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|by peer|remote process|Broken pipe")


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong and what to do."""


def one_line(error: Exception) -> str:
    """Returns a library's error as part of a message: one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def is_lost_process(error: Exception) -> bool:
    """Tells whether JAX failed because another process of the run is gone."""
    return _LOST.search(str(error)) is not None
