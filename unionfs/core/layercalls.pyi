from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

def call(function: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T: ...
def read(fd: int, size: int, offset: int) -> bytes: ...
