"""The two ways a command can fail, so that a caller and a shell can tell them apart."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LeantrainError(Exception):
    """Base of every error a user is meant to read. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(LeantrainError, ValueError):
    """What was asked for is not allowed: a wrong key, value, shape or combination. Nothing was started."""

    exit_code = 2


class RunError(LeantrainError, RuntimeError):
    """A run that was allowed could not go on: a full disk, a dead peer, a non-finite loss, a damaged file."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown `word`: the closest allowed one if any is close, and all of them."""
    choices = sorted(allowed)
    close = difflib.get_close_matches(word, choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (allowed: {', '.join(choices)})"
