"""Images in archives, and the store: what is checked, shared, refused and removed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.layers import (
    Layout,
    digest,
    directory,
    file,
    nothing_left,
    saved,
    symlink,
    tar,
    whiteout,
)
from tests.support.patience import patient
from unionfs.errors import UserError
from unionfs.images.blobs import opened_layers
from unionfs.images.documents import REF_NAME
from unionfs.images.rules import DEFAULTS, Rules
from unionfs.images.store import Image, Store, markers_of
from unionfs.images.using import image_layers, users_of_layers
from unionfs.storage.archive.progress import Progress

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = tar([directory("d"), file("d/x", b"x"), file("f", b"f")])
TOP = tar([directory("d"), whiteout("d/x"), file("new", b"new")])


def take(area: Path, reference: str, rules: Rules = DEFAULTS) -> tuple[Image, list[str]]:
    """Unpack an image; returns it and its layers, topmost first."""
    with image_layers(reference, str(area / "root"), userxattr=False, rules=rules, notes=[]) as found:
        return found


def names(layers: list[str]) -> list[bytes]:
    """The names in the root of the merged layers."""
    with opened_layers(layers, markers_of("trusted")) as merge:
        return sorted(merge.listing(merge.roots).entries().names())


@pytest.mark.parametrize("form", ["oci-archive", "oci", "docker-archive", "uncompressed"])
def test_an_image_of_each_form(form: str, root: None, area: Path) -> None:
    if form == "docker-archive":
        reference = saved(area / "image.tar", [BASE, TOP], ["example.org/app:1", "app:2"])
    else:
        layout = Layout(BASE, TOP, compress=form != "uncompressed")
        layout.annotations = {REF_NAME: "example.org/app:1"}
        reference = layout.tree(area / "image") if form == "oci" else layout.archive(area / "image.tar")
    image, layers = take(area, reference)
    assert names(layers) == [b"d", b"f", b"new"]
    assert [Path(layer).parent.name for layer in layers] == [digest(TOP)[7:], digest(BASE)[7:]]
    assert image.names[0] == "example.org/app:1"
    store = Store(str(area / "root"))
    for text in ("app:1", "example.org/app:1", image.id, image.id[:8], f"sha256:{image.id}"):
        assert store.find(text).id == image.id
    assert take(area, image.id)[1] == layers


def test_layers_are_unpacked_once(root: None, area: Path) -> None:
    _, first = take(area, Layout(BASE, TOP).archive(area / "a.tar"))
    before = [os.stat(path).st_ino for path in first]
    _, second = take(area, saved(area / "b.tar", [BASE, TOP], ["b:1"], {"Env": ["A=1"]}))
    assert first == second
    assert [os.stat(path).st_ino for path in second] == before
    assert len(Store(str(area / "root")).images()) == 2


def test_a_name_moves_to_the_newer_image(root: None, area: Path) -> None:
    take(area, saved(area / "a.tar", [BASE], ["app:1", "app:old"]))
    take(area, saved(area / "b.tar", [BASE, TOP], ["app:1"]))
    assert [image.names for image in Store(str(area / "root")).images()] == [("app:old",), ("app:1",)]


def test_an_opaque_root_hides_the_layers_below(root: None, area: Path) -> None:
    over = tar([file(".wh..wh..opq"), file("only", b"1")])
    _, layers = take(area, Layout(BASE, over).archive(area / "a.tar"))
    assert names(layers) == [b"only"]


def test_a_layer_that_occurs_twice(root: None, area: Path) -> None:
    _, layers = take(area, Layout(BASE, TOP, BASE).archive(area / "a.tar"))
    assert len(layers) == 2
    with opened_layers(layers, markers_of("trusted")) as merge:
        assert merge.search(merge.roots, b"f") is not None
    assert names(layers) == [b"d", b"f", b"new"]


def test_a_tag_chooses_the_image(root: None, area: Path) -> None:
    one, two = Layout(BASE), Layout(BASE, TOP)
    files = {**one.files(), **two.files()}
    entries = []
    for tag, layout in (("one", one), ("two", two)):
        (entry,) = json.loads(layout.files()["index.json"])["manifests"]
        entries.append({**entry, "annotations": {REF_NAME: tag}})
    files["index.json"] = json.dumps({"manifests": entries}).encode()
    (area / "both.tar").write_bytes(tar(file(name, data) for name, data in files.items()))
    with pytest.raises(UserError, match="2 images, named one, two; append :TAG"):
        take(area, f"oci-archive:{area}/both.tar")
    with pytest.raises(UserError, match="no images three"):
        take(area, f"oci-archive:{area}/both.tar:three")
    assert len(take(area, f"oci-archive:{area}/both.tar:two")[1]) == 2


def test_an_index_of_platforms(root: None, area: Path) -> None:
    layout = Layout(BASE)
    (mine,) = json.loads(layout.files()["index.json"])["manifests"]
    other = {**mine, "platform": {"os": "linux", "architecture": "mips"}, "digest": "sha256:" + "0" * 64}
    mine["platform"] = {"os": "linux", "architecture": layout.config["architecture"]}
    inner = json.dumps({"schemaVersion": 2, "manifests": [other, mine]}).encode()
    layout.index = {
        "manifests": [Layout.described("application/vnd.oci.image.index.v1+json", inner)],
    }
    layout.more = {f"blobs/sha256/{digest(inner)[7:]}": inner}
    assert names(take(area, layout.archive(area / "a.tar"))[1]) == [b"d", b"f"]


def forged(change: Callable[[Layout], object]) -> Layout:
    layout = Layout(BASE, TOP)
    change(layout)
    return layout


def _other_content(layout: Layout) -> None:
    blob = gzip.compress(tar([file("evil")]), mtime=0)
    layout.more[f"blobs/sha256/{digest(layout.layers[0])[7:]}"] = blob
    layout.manifest["layers"][0]["size"] = len(blob)


def _other_manifest(layout: Layout) -> None:
    files = layout.files()
    name = f"blobs/sha256/{json.loads(files['index.json'])['manifests'][0]['digest'][7:]}"
    layout.more[name] = files[name][:-1] + b" "


def _index_of_itself(layout: Layout) -> None:
    inner = json.dumps({"manifests": []}).encode()
    entry = Layout.described("application/vnd.oci.image.index.v1+json", inner)
    for _ in range(5):
        inner = json.dumps({"manifests": [entry]}).encode()
        entry = Layout.described("application/vnd.oci.image.index.v1+json", inner)
        layout.more[f"blobs/sha256/{digest(inner)[7:]}"] = inner
    layout.index = {"manifests": [entry]}


FORGED: dict[str, tuple[Callable[[Layout], object], str]] = {
    "a layer with other content": (_other_content, "its digest is"),
    "a diff id of other content": (
        lambda one: one.config["rootfs"].update(diff_ids=[digest(b"1"), digest(TOP)]), "its diff id is",
    ),
    "a wrong size": (lambda one: one.manifest["layers"][1].update(size=17), "bytes, and not 17"),
    "a negative size": (lambda one: one.manifest["layers"][1].update(size=-1), "bytes, and not -1"),
    "a wrong manifest": (_other_manifest, "does not have the digest"),
    "a digest with a path": (
        lambda one: one.manifest["layers"][0].update(digest="sha256:../../etc/passwd"), "not a sha256 digest",
    ),
    "another kind of digest": (
        lambda one: one.manifest["layers"][0].update(digest="md5:" + "0" * 32), "not a sha256 digest",
    ),
    "a diff id with a path": (
        lambda one: one.config["rootfs"].update(diff_ids=["sha256:../x", "y"]), "not a sha256 digest",
    ),
    "an encrypted layer": (
        lambda one: one.manifest["layers"][0].update(
            mediaType="application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
        ),
        "which is not a tar",
    ),
    "more layers than diff ids": (lambda one: one.config["rootfs"]["diff_ids"].pop(), "2 layers"),
    "no config": (lambda one: one.manifest.update(config="none"), "manifest is malformed"),
    "another platform": (lambda one: one.config.update(architecture="mips"), "--any-platform"),
    "another system": (lambda one: one.config.update(os="windows"), "--any-platform"),
    "huge JSON": (lambda one: one.config.update(x="y" * (5 << 20)), "larger than 4 MiB"),
    "deep JSON": (lambda one: one.more.update({"index.json": b"[" * 200_000}), "index is malformed"),
    "deep JSON in a member": (
        lambda one: one.more.update({"index.json": b'{"manifests": [], "x": ' + b"[" * 200_000}), "malformed",
    ),
    "an index of indexes": (_index_of_itself, "which is not an image"),
    "no index": (lambda one: one.more.update({"index.json": b"{}"}), "index is malformed"),
    "no layout": (lambda one: one.more.update({"oci-layout": b"{}"}), "oci-layout is malformed"),
    "an unknown layout": (
        lambda one: one.more.update({"oci-layout": b'{"imageLayoutVersion": "2.0"}'}), "not known",
    ),
    "a name with a line feed": (lambda one: one.annotations.update({REF_NAME: "a\nb"}), "name 'a\\nb'"),
    "a file outside": (lambda one: one.more.update({"../../escaped": b"x"}), "leads out of it"),
    "an absolute file": (lambda one: one.more.update({"/tmp/escaped": b"x"}), "is absolute"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_images_are_refused(name: str, root: None, area: Path) -> None:
    change, words = FORGED[name]
    reference = forged(change).archive(area / "image.tar")
    with pytest.raises(UserError) as refused:
        take(area, reference)
    text = str(refused.value)
    assert words in text
    assert text.startswith(("the image oci-archive:", "the layer sha256:"))
    assert text.isprintable()
    assert text.endswith(".")
    assert len(text) < 500
    assert nothing_left(area / "root")


def test_a_hostile_layer_above_a_good_one_leaves_nothing(root: None, area: Path) -> None:
    """The good one neither; but one that another image has stays."""
    hostile = tar([file("../x")])
    with pytest.raises(UserError, match="leads out of the layer"):
        take(area, Layout(BASE, hostile).archive(area / "a.tar"))
    store = Store(str(area / "root"))
    assert store.images() == []
    assert nothing_left(area / "root")
    take(area, Layout(BASE).archive(area / "good.tar"))
    with pytest.raises(UserError, match="leads out of the layer"):
        take(area, Layout(BASE, TOP, hostile).archive(area / "a.tar"))
    assert [name for _, name in store.all_layers()] == [digest(BASE)[7:]]
    assert names(take(area, Layout(BASE).archive(area / "good.tar"))[1]) == [b"d", b"f"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(b""), "cut off"),
        (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "decompress it first"),
        (lambda path: os.truncate(path, 3000), "cut off"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(tar([file("a"), file("a")])), "two files"),
        (lambda path: path.write_bytes(tar([file("a")])), "not in the OCI format"),
        (
            lambda path: path.write_bytes(tar([symlink("oci-layout", "b"), symlink("b", "oci-layout")])),
            "leads nowhere",
        ),
    ],
)
def test_damaged_archives_are_refused(
    root: None, area: Path, change: Callable[[Path], object], words: str
) -> None:
    reference = Layout(BASE).archive(area / "a.tar")
    change(area / "a.tar")
    with pytest.raises(UserError, match=words):
        take(area, reference)
    assert nothing_left(area / "root")


def test_a_directorys_blob_that_is_a_symlink_is_refused(root: None, area: Path) -> None:
    reference = Layout(BASE).tree(area / "image")
    blobs = (area / "image/blobs/sha256").iterdir()
    (blob,) = (path for path in blobs if path.read_bytes().startswith(b"\x1f\x8b"))
    blob.rename(area / "elsewhere")
    blob.symlink_to(area / "elsewhere")
    with pytest.raises(UserError, match="cannot be read"):
        take(area, reference)
    assert nothing_left(area / "root")


@pytest.mark.parametrize(
    "reference", ["docker://debian", "containers-storage:x", "oci-archive:", "none", "oci:"]
)
def test_references_that_name_nothing_here(reference: str, root: None, area: Path) -> None:
    with pytest.raises(UserError):
        take(area, reference)


def test_a_saved_image_with_a_wrong_diff_id(root: None, area: Path) -> None:
    path = area / "a.tar"
    saved(path, [BASE], ["a:1"])
    data = path.read_bytes().replace(b"x" + bytes(511), b"y" + bytes(511), 1)
    path.write_bytes(data)
    with pytest.raises(UserError, match="diff id"):
        take(area, f"docker-archive:{path}")
    assert nothing_left(area / "root")


def importing(area: Path, reference: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "unionfs", "image", "import", "--root", str(area / "root"), reference],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_same_image_imported_by_several_at_once(root: None, area: Path) -> None:
    layers = [tar([file(f"{n}/{m}", bytes([n]) * 100) for m in range(300)]) for n in range(3)]
    reference = Layout(*layers).archive(area / "a.tar")
    running = [importing(area, reference) for _ in range(5)]
    ends = [process.communicate(timeout=patient(60)) for process in running]
    assert [errors for _, errors in ends] == [""] * 5
    assert len({output for output, _ in ends}) == 1
    assert len(list(Store(str(area / "root")).all_layers())) == 3
    assert len(names(take(area, reference)[1])) == 3


def test_a_killed_import_leaves_nothing_that_counts(root: None, area: Path) -> None:
    layer = tar([file(f"d{n % 50}/{n}", b"x" * 100) for n in range(20_000)])
    reference = Layout(layer).archive(area / "a.tar")
    new = area / f"root/images/layers/trusted/.new-{digest(layer)[7:]}"
    process = importing(area, reference)
    while not (new / "root/d0").exists():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = Store(str(area / "root"))
    assert new.exists()
    assert not store.has_layer("trusted", digest(layer)[7:])
    assert store.images() == []
    # The next import begins anew; so does prune.
    _, layers = take(area, reference)
    assert sum(len(files) for _, _, files in os.walk(layers[0])) == 20_000
    assert not new.exists()
    new.mkdir()
    assert store.prune({}) == [str(new)]


def test_removal(root: None, area: Path) -> None:
    first, layers = take(area, saved(area / "a.tar", [BASE], ["a:1"]))
    second, _ = take(area, saved(area / "b.tar", [BASE, TOP], ["b:1"]))
    store = Store(str(area / "root"))
    with pytest.raises(UserError, match=r"a:1 cannot be removed: the mount /m uses it"):
        store.remove([first], {layers[0]: "the mount /m"})
    # While another process reads it.
    with (
        image_layers("a:1", str(area / "root"), userxattr=False, rules=DEFAULTS, notes=[]),
        pytest.raises(UserError, match="another process uses it"),
    ):
        store.remove([first], {})
    assert store.prune({}) == []
    assert store.remove([second], {}) == [str(Path(store.layer("trusted", digest(TOP)[7:])).parent)]
    assert [image.id for image in store.images()] == [first.id]
    store.remove([first], users_of_layers({}))
    assert nothing_left(area / "root")
    with pytest.raises(UserError, match="there is no image a:1"):
        take(area, "a:1")


class _Shares(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []

    def show(self) -> None:
        assert self.share is not None
        self.shares.append(self.share)


def test_progress(root: None, area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes over all layers that are missing, and nothing is counted for those that are there."""
    monkeypatch.setattr("unionfs.storage.archive.progress._SECONDS", 0.0)
    data = [os.urandom(300_000) for _ in range(8)]
    big = tar([file(f"big{number}", content) for number, content in enumerate(data[:6])])
    layout = Layout(big, tar([file(f"more{number}", content) for number, content in enumerate(data[6:])]))
    seen = _Shares()
    words = {"userxattr": False, "rules": DEFAULTS}
    reference = layout.archive(area / "image.tar")
    with image_layers(reference, str(area / "root"), notes=[], progress=seen, **words):
        assert (seen.entries, seen.size) == (8, 8 * 300_000)
    assert seen.shares == sorted(seen.shares)
    assert seen.share == 1.0
    # Entries of the first layer, the larger one, are no more than its share of both.
    assert all(0.0 <= share < 0.8 for share in seen.shares[:5])
    again = _Shares()
    with image_layers(reference, str(area / "root"), notes=[], progress=again, **words):
        assert again.shares == []
