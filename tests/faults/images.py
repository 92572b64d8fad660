"""Faults in commands of images and layers: unpacking, writing, removing."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tests.faults import commands
from tests.faults.commands import Scenario
from tests.support.layers import Layout, directory, file, hard_link, shown, symlink, tar, whiteout
from unionfs.images.store import Store

_BASE: Final = tar([
    directory("d", uid=5), file("d/a", b"a" * 5000), file("d/b", b"b"), hard_link("d/link", "d/a"),
    symlink("s", "d/a"),
])  # fmt: skip
_TOP: Final = tar([directory("d", uid=6), whiteout("d/b"), file("d/c", b"c" * 70_000)])


def _archive(place: Path) -> str:
    return Layout(_BASE, _TOP).archive(place / "image.tar")


def _layers(place: Path) -> None:
    (place / "base.tar").write_bytes(_BASE)
    (place / "top.tar").write_bytes(_TOP)


def _imported(place: Path) -> None:
    _run(place, "image", "import", _archive(place))


def _unused(place: Path) -> None:
    """Layers that no image has any more, and what a killed process has left."""
    _imported(place)
    for record in (place / "storage/images/records").iterdir():
        record.unlink()
    left = place / f"storage/images/layers/trusted/.new-{'0' * 64}"
    (left / "root").mkdir(parents=True)
    (left / "root/f").write_text("f")


def _unpacked(place: Path) -> None:
    _layers(place)
    _run(place, "layer", "import", f"{place}/top.tar", f"{place}/upper")
    _run(place, "layer", "import", f"{place}/base.tar", f"{place}/lower")


def _run(place: Path, *words: str) -> None:
    outcome, _ = commands.run(place, words)
    assert outcome.code == 0, outcome.text


def _mounted(place: Path) -> None:
    _unpacked(place)
    (place / "work").mkdir()
    (place / "merged").mkdir()
    layers = ["-l", f"{place}/lower", "-u", f"{place}/upper", "-w", f"{place}/work"]
    _run(place, "mount", *layers, f"{place}/merged")


def _content(name: str) -> Callable[[Path], Any]:
    """The bytes of a file, as their digest."""

    def found(place: Path) -> Any:
        path = place / name
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    return found


def _tree(place: Path) -> Any:
    """The layer, None without it."""
    return shown(place / "dir", private=True) if (place / "dir").exists() else None


def _store(place: Path) -> Any:
    """The images, and the layers with all their files."""
    store = Store(str(place / "storage"))
    layers = [(kind, id) for kind, id in store.all_layers() if not id.startswith(".")]
    found = {id: shown(Path(store.layer(kind, id)), times=False, private=True) for kind, id in layers}
    images = [(image.id, image.layers) for image in store.images()]
    return (images, found) if images or found else None


def _are_unpacked(state: Any, new: Any) -> bool:
    """Whether layers are there as a whole and the image is not: it comes last."""
    images, layers = state
    return not images and layers.items() <= new[1].items()


def _committed(place: Path) -> Any:
    """The layers of the archive, without their times; the rest of it has the time of the commit."""
    if not (place / "out.tar").exists():
        return None
    found = []
    with tarfile.open(place / "out.tar") as archive:
        for blob in filter(tarfile.TarInfo.isfile, archive):
            data = archive.extractfile(blob)
            assert data is not None
            if not (content := data.read()).startswith(b"{"):
                with tarfile.open(fileobj=io.BytesIO(content)) as layer:
                    found.append([(one.name, one.type, one.size, one.mode, one.uid) for one in layer])
    return found


def _has_layers(place: Path) -> bool:
    """Also those that are half made, or half removed."""
    return any((place / "storage/images/layers/trusted").iterdir())


def _words(*words: str) -> Callable[[Path], Sequence[str]]:
    return lambda place: [word.replace("PLACE", str(place)) for word in words]


SCENARIOS: Final = [
    Scenario("layer import", _layers, _words("layer", "import", "PLACE/base.tar", "PLACE/dir"), _tree),
    Scenario("layer export", _unpacked, _words(
        "layer", "export", "-u", "PLACE/upper", "-l", "PLACE/lower", "-o", "PLACE/out.tar.gz",
    ), _content("out.tar.gz")),
    Scenario("layer squash", _layers, _words(
        "layer", "squash", "PLACE/base.tar", "PLACE/top.tar", "-o", "PLACE/out.tar",
    ), _content("out.tar"), sweeps=_words("image", "prune")),
    Scenario("image import", _archive, _words("image", "import", "oci-archive:PLACE/image.tar"), _store,
             halfway=_are_unpacked),
    # the next one removes locks of layers that are gone
    Scenario("image prune", _unused, _words("image", "prune"), _has_layers, sweeps=_words("image", "prune")),
    Scenario("commit to an image", _mounted, _words(
        "commit", "--image", "oci-archive:PLACE/out.tar", "PLACE/merged",
    ), _committed),
]  # fmt: skip
