"""What nobody need wait for: it is done at once, or left until an answer is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVarTuple

Later = list[tuple[Callable[..., None], tuple[Any, ...]]]
"""Functions to be called, and their arguments."""

_Ts = TypeVarTuple("_Ts")


def do_or_leave(later: Later | None, function: Callable[[*_Ts], None], *arguments: *_Ts) -> None:
    """Call a function now, or leave that to who empties ``later``."""
    if later is None:
        function(*arguments)
    else:
        later.append((function, arguments))
