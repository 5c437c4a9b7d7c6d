"""The one exception that a user's mistake or machine can cause, and how a command reports it."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend; its text is one line that says what to do."""


def command(main: Callable[[], int]) -> Callable[[], int]:
    """Wraps a command's `main`: a UserError becomes one line on stderr and exit status 2, Ctrl-C becomes 130."""

    @functools.wraps(main)
    def wrapped() -> int:
        # Orbax reports each save through absl at WARNING and above; what matters reaches the user as a UserError.
        logging.getLogger("absl").setLevel(logging.ERROR)
        try:
            return main()
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output (`| head`) left; Python would complain again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    return wrapped
