"""The base of all requests: a tuple whose fields are read by name.

Rules:
- A request is a tuple, so that one call of `Struct.unpack_from` creates nearly all of it. Every class has the
  fields of `Request`, then those of the body's structure in the header's order, then the data after the
  structure (names, a value, data).
- The annotations of a class are its fields (without any, its base's are). They are checked against structs.py
  at class creation, so a class cannot disagree with the ABI. `renamed` maps the header's names that would
  hide another field.
- Values are unchecked: decode.py creates a request with `tuple.__new__`.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, ClassVar, Final, Self

from unionfs.fuse.protocol.flags import UNIQUE_RESEND, Opcode
from unionfs.fuse.protocol.structs import LAYOUTS

HEADER_FIELDS: Final = ("message_size", "number", "unique", "nodeid", "uid", "gid", "pid", "extlen")
"""The fields of fuse_in_header, renamed where they would hide another."""


class Request(tuple[Any, ...]):
    """The base class of requests.

    message_size: in bytes. number: the opcode as sent; `opcode` is the class's.
    unique: the id to answer with, resend bit included. nodeid: the object (or directory) meant.
    uid, gid, pid: of the caller, in the namespaces of the mount; pid is 0 where it cannot be seen.
    extlen: of extensions at the message's end (none are negotiated), in 8-byte units.
    """

    __slots__ = ()

    opcode: ClassVar[Opcode]
    body: ClassVar[str | None] = None
    """The header's name of the structure that follows the header."""
    fields: ClassVar[tuple[str, ...]]

    message_size: int
    number: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    extlen: int

    def __init_subclass__(
        cls, opcode: Opcode | None = None, body: str | None = None, renamed: dict[str, str] | None = None
    ) -> None:
        super().__init_subclass__()
        own = tuple(cls.__annotations__) or getattr(cls, "fields", HEADER_FIELDS)[len(HEADER_FIELDS) :]
        if body is not None:
            names = [(renamed or {}).get(name, name) for name in LAYOUTS[body].names]
            if list(own[: len(names)]) != names:
                raise TypeError(f"{cls.__name__} has the fields {own}, but {body} has {names}.")
        if opcode is not None:
            cls.opcode = opcode
        cls.body = body
        cls.fields = HEADER_FIELDS + own
        # Not by namedtuple(): its fields are a little faster, but creating the classes delays the start.
        for index, name in enumerate(cls.fields):
            setattr(cls, name, property(itemgetter(index)))

    @property
    def resent(self) -> bool:
        """Whether this was sent before, to a daemon that is gone (7.40), which may have executed it."""
        return bool(self.unique & UNIQUE_RESEND)

    @classmethod
    def of(cls, **values: object) -> Self:
        """Create a request for tests: missing fields are 0. Raises TypeError for an unknown name."""
        unknown = values.keys() - set(cls.fields)
        if unknown:
            raise TypeError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}.")
        if not issubclass(cls, Unknown):
            values.setdefault("number", int(cls.opcode))
        return cls(values.get(name, 0) for name in cls.fields)

    def __repr__(self) -> str:
        first = self.fields.index("number" if isinstance(self, Unknown) else "unique")
        pairs = zip(self.fields[first:], self[first:], strict=True)
        shown = ", ".join(f"{name}={value!r}" for name, value in pairs)
        return f"{type(self).__name__}({shown})"


class Unknown(Request):
    """A request without a class: answer ENOSYS. `data` is its body."""

    __slots__ = ()
    data: memoryview
