"""`--restart`: when a container's command is started again, and how long after its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from unionfs.errors import UserError, quoted

_WORDS: Final = ("no", "on-failure", "always", "unless-stopped")
# moby, daemon/internal/restartmanager
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 60.0
_LONG_RUN: Final = 10.0


@dataclass(frozen=True, slots=True)
class Policy:
    word: str = "no"
    most: int | None = None
    """How often a command that fails is started again; None: without a limit."""

    def __str__(self) -> str:
        return self.word if self.most is None else f"{self.word}:{self.most}"


def parse_policy(text: str) -> Policy:
    """Raises UserError."""
    word, colon, number = text.partition(":")
    if word not in _WORDS:
        raise UserError(f"--restart {quoted(text)}: give one of {', '.join(_WORDS)}, or on-failure:N.")
    if not colon:
        return Policy(word)
    if word != "on-failure" or not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise UserError(f"--restart {quoted(text)}: only on-failure takes a number; write on-failure:3.")
    return Policy(word, int(number))


class Restarts:
    """Counts the restarts of one container, with pauses that grow."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.count = 0
        self._pause = _FIRST_PAUSE

    def pause(self, code: int, seconds: float) -> float | None:
        """Return how many seconds to wait after a run of `seconds` that ended with `code`.

        None: it is not started again.
        """
        policy = self.policy
        if policy.word == "no" or (policy.word == "on-failure" and code == 0):
            return None
        if policy.most is not None and self.count >= policy.most:
            return None
        if seconds >= _LONG_RUN:
            self._pause = _FIRST_PAUSE
        pause = self._pause
        self._pause = min(2 * pause, _LONGEST_PAUSE)
        self.count += 1
        return pause
