"""The same small wrong changes to a module of the core, which is Cython: what Python's tokens show of it.

Only tokens and whole statements are changed, since nothing here parses Cython. A change that does not
compile counts as noticed. Declarations (`cdef extern`, signatures) stay as they are.
"""

from __future__ import annotations

import ast
import io
import keyword
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mutants_changes import Mutant

_OTHERS: Final = {
    "==": "!=", "!=": "==", "<": "<=", "<=": "<", ">": ">=", ">=": ">",
    "+": "-", "-": "+", "|": "&", "&": "|", "+=": "-=", "-=": "+=", "and": "or", "or": "and",
    "True": "False", "False": "True",
}  # fmt: skip
_KEYWORDS: Final = {*keyword.kwlist, "cdef", "cpdef", "cimport", "nogil", "gil"} - {"None", "True", "False"}
_LEFT_OUT: Final = ("raise", "continue", "break")
_UNCHANGED: Final = ("from", "import", "cimport", "class", "def", "global", "@")
_COMPOUND: Final = {"and", "or", "not", "in", "is", "==", "!=", "<=", ">=", "<", ">"}

Line = list[tokenize.TokenInfo]


def find(path: Path) -> list[Mutant]:
    """The changes of a module."""
    code = path.read_bytes()
    lines = code.splitlines(keepends=True)
    found = []
    for line in _lines(code.decode()):
        for first, last, text in _changes(line, lines):
            start, end = (sum(map(len, lines[: row - 1])) + column for row, column in (first, last))
            begin = code.rindex(b"\n", 0, start) + 1
            until = code.index(b"\n", end)
            shown = code[begin:until], code[begin:start] + text.encode() + code[end:until]
            before, after = (" ".join(part.decode().split()) for part in shown)
            found.append(Mutant(path, code, first[0], start, end, text.encode(), before, after))
    return found


def build(copy: Path) -> bool:
    """Build what has changed in a copy of the repository; returns whether it compiles."""
    words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(words, cwd=copy, capture_output=True, check=False).returncode == 0


def _lines(code: str) -> Iterator[Line]:
    """The logical lines with statements that may be changed."""
    line: Line = []
    inside: int | None = None
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type in ignored:
            continue
        if token.type != tokenize.NEWLINE:
            line.append(token)
            continue
        words, column = [token.string for token in line], line[0].start[1]
        if inside is None or column <= inside:  # not below `cdef extern`
            inside = column if words[0] == "cdef" and words[1] in ("extern", "enum", "struct") else None
            is_declared = words[0] in ("cdef", "cpdef") and (words[-1] == ":" or "=" not in words)
            if inside is None and words[0] not in _UNCHANGED and not is_declared:
                yield line
        line = []


Change = tuple[tuple[int, int], tuple[int, int], str]


def _changes(line: Line, lines: list[bytes]) -> Iterator[Change]:
    cast = False
    for before, token, after in zip([None, *line], line, [*line[1:], None], strict=False):
        word = token.string
        if word == "<" and not _is_operand(before):
            cast = True
        elif word == ">" and cast:
            cast = False
        elif word == "not":
            assert after is not None
            if after.string != "None" or (before is not None and before.string == "is"):
                yield token.start, after.start, ""
        elif word in _OTHERS:
            if not cast and (_is_operand(before) or token.type == tokenize.NAME):
                yield token.start, token.end, _OTHERS[word]
        elif word in ("is", "in") and line[0].string != "for":
            beside = after if word == "is" else before
            if beside is not None and beside.string != "not":  # else "not" is left out above
                yield token.start, token.end, "is not" if word == "is" else "not in"
        elif token.type == tokenize.NUMBER:
            yield token.start, token.end, f"({ast.literal_eval(word) + 1})"
    yield from _whole(line, lines)


def _whole(line: Line, lines: list[bytes]) -> Iterator[Change]:
    """Changes of the condition, or of the statement as a whole."""
    words = [token.string for token in line]
    start, end = line[0].start, line[-1].end
    if words[0] in ("if", "elif", "while"):
        if not _COMPOUND & set(words) and start[0] == end[0]:
            first, last = line[1].start, line[-1].start
            text = lines[first[0] - 1].decode()[first[1] : last[1]]
            yield first, last, f"not ({text})"
    elif words[0] in _LEFT_OUT or words == ["return"]:
        yield start, end, "pass"
    elif words[0] not in _KEYWORDS and line[0].type == tokenize.NAME:
        is_assignment = _assigns(words)
        if (words[-1] == ")" and not is_assignment) or (is_assignment and words[1] in (".", "+=", "-=")):
            yield start, end, "pass"


def _assigns(words: list[str]) -> bool:
    depth = 0
    for word in words:
        depth += (word in "([{") - (word in ")]}")
        if depth == 0 and word in ("=", "+=", "-="):
            return True
    return False


def _is_operand(token: tokenize.TokenInfo | None) -> bool:
    if token is None:
        return False
    if token.type == tokenize.NAME:
        return token.string not in _KEYWORDS
    return token.type in (tokenize.NUMBER, tokenize.STRING) or token.string in (")", "]")
