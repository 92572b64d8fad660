"""The keys of the configuration files, in TOML, and their values. `storage.configured` reads the files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from unionfs.errors import UserError, quoted
from unionfs.settings.drivers import DEFAULT, STORAGE_DRIVERS, nearest
from unionfs.settings.mount import IO_MODES, LOG_LEVELS, SESSIONS
from unionfs.settings.runtime import AUTO, RUNTIMES


@dataclass(frozen=True, slots=True)
class Value:
    """A value and the file that it comes from; None: the built-in default."""

    value: Any
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Configuration:
    values: Mapping[str, Value] = field(default_factory=dict)
    """By key; `volume-options` has one for each driver and option, as `volume-options.local.size`."""

    def get(self, key: str) -> Any:
        return self.values[key].value

    def volume_options(self, driver: str) -> dict[str, str]:
        """Return the default options of volumes of a driver."""
        start = f"{_OPTIONS}.{driver}."
        return {
            key.removeprefix(start): str(value.value)
            for key, value in self.values.items()
            if key.startswith(start)
        }


def _one_of(words: Iterable[str]) -> Callable[[Any], str | None]:
    known = tuple(words)
    return lambda value: None if value in known else nearest(str(value), known)


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value and "\0" not in value else "it is a text."


def _path(value: Any) -> str | None:
    right = _text(value) is None and value.startswith("/")
    return None if right else "it is an absolute path."


_OPTIONS: Final = "volume-options"
# Name: built-in default, and what returns the cure of a wrong value.
KEYS: Final[Mapping[str, tuple[Any, Callable[[Any], str | None]]]] = {
    "root": (None, _path),
    "session": ("auto", _one_of(SESSIONS)),
    "io": ("auto", _one_of(IO_MODES)),
    "log-level": ("info", _one_of(LOG_LEVELS)),
    "volume-driver": ("local", _text),
    "storage-driver": (DEFAULT, _one_of(STORAGE_DRIVERS)),
    "runtime": (AUTO, _one_of(RUNTIMES)),
}


def parse(path: str, content: bytes) -> dict[str, Value]:
    """Return the values of a file with this path and content.

    Raises UserError for what is not TOML, an unknown key, or an invalid value.
    """
    # For start-up time: most hosts have no such file.
    import tomllib

    try:
        table = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{quoted(path)} is not TOML: {error}; correct it.") from error
    found = {}
    for key, value in table.items():
        if key == _OPTIONS:
            found.update(_volume_options(path, value))
            continue
        if key not in KEYS:
            raise _unknown(path, key)
        if (cure := KEYS[key][1](value)) is not None:
            raise UserError(f"{quoted(path)}: invalid {key} = {value!r}; {cure}")
        found[key] = Value(value, path)
    return found


def _unknown(path: str, key: str) -> UserError:
    known = (*KEYS, _OPTIONS)
    return UserError(f"{quoted(path)}: unknown key {quoted(key)}; {nearest(key, known)}")


def _volume_options(path: str, value: Any) -> dict[str, Value]:
    """Read the tables `[volume-options.DRIVER]`."""
    found = {}
    drivers = value.items() if isinstance(value, dict) else [("", None)]
    for driver, options in drivers:
        if not isinstance(options, dict):
            raise UserError(
                f"{quoted(path)}: {_OPTIONS} has one table for each driver; write [{_OPTIONS}.local] and its "
                "options below."
            )
        for name, option in options.items():
            if isinstance(option, bool):
                option = "true" if option else "false"
            if not isinstance(option, str | int):
                raise UserError(f"{quoted(path)}: invalid {name} = {option!r} of {driver}; write a text.")
            found[f"{_OPTIONS}.{driver}.{name}"] = Value(str(option), path)
    return found
