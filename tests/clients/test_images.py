"""Images that podman and skopeo write, and images that they read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients.support import run
from tests.mount import cli_calls
from tests.mount.cli_calls import Place, succeed
from tests.mount.run_calls import BUSYBOX
from tests.support.layers import Comparable, difference, shown
from unionfs.images.layers import export_layer

pytestmark = pytest.mark.clients

CONTAINERFILE = """\
FROM base
RUN chmod 1777 /tmp && rm /d/f && mkdir /d/x && echo 1 > /d/x/y && chown -R 1000:1001 /d/x
RUN rm -r /d && mkdir /d && echo new > /d/z && ln /d/z /d/zz && mv /old /renamed
RUN rm -r /renamed && echo file > /renamed && ln -s z /d/link && chmod 4755 /bin/busybox
RUN touch -d @1000 /d/z && rm /renamed && mkdir /renamed && echo back > /renamed/f
ENV FOO=bar
USER 1000:1001
CMD ["/bin/id"]
"""


class Podman:
    """podman and skopeo with a private store on kernel overlayfs."""

    def __init__(self, root: Path, runtime: Path) -> None:
        self.root = root
        (root / "tmp").mkdir(parents=True)
        (root / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{root}/graph"\nrunroot = "{runtime}/run"\n'
        )
        (root / "containers.conf").write_text(
            '[containers]\nnetns = "host"\ndefault_sysctls = []\ndefault_ulimits = []\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
            f'runtime = "runc"\ntmp_dir = "{runtime}/tmp"\n'
        )
        self.environment = {
            "CONTAINERS_STORAGE_CONF": f"{root}/storage.conf",
            "CONTAINERS_CONF": f"{root}/containers.conf",
            "TMPDIR": f"{root}/tmp",
            "BUILDAH_ISOLATION": "chroot",
        }

    def podman(self, *words: str | Path) -> str:
        return run("podman", *words, env=self.environment)

    def skopeo(self, source: str, target: str, *words: str) -> None:
        run("skopeo", "copy", "-q", "--insecure-policy", *words, source, target, env=self.environment)

    def build(self) -> None:
        """Make the image `app` with a layer a step."""
        assert BUSYBOX is not None
        base = self.root / "base"
        for name in ("bin", "etc", "tmp", "d", "old/deep", "proc", "sys", "dev", "run"):
            (base / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, base / "bin/busybox")
        for name in ("sh", "rm", "mkdir", "echo", "chmod", "chown", "ln", "mv", "touch", "id", "cat"):
            (base / "bin" / name).symlink_to("busybox")
        (base / "d/f").write_text("f")
        os.link(base / "d/f", base / "d/g")
        (base / "old/deep/file").write_text("deep")
        tar = self.root / "base.tar"
        run("tar", "-C", base, "--numeric-owner", "-cf", tar, ".")
        self.podman("import", tar, "base")
        (self.root / "Containerfile").write_text(CONTAINERFILE)
        file = self.root / "Containerfile"
        self.podman("build", "-q", "--layers", "-t", "app", "-f", file, self.root / "tmp")

    def tree(self, image: str) -> Comparable:
        """What kernel overlayfs shows of the layers that podman unpacked."""
        path = self.podman("image", "mount", image).strip()
        try:
            return without_root(shown(Path(path)))
        finally:
            self.podman("image", "umount", image)

    def close(self) -> None:
        self.podman("system", "reset", "--force")


def without_root(tree: Comparable) -> Comparable:
    """Without the root's attributes, which the tars of most layers do not have."""
    return {path: entry for path, entry in tree.items() if path != b"."}


@pytest.fixture
def place(root: None, area: Path) -> Iterator[Place]:
    with cli_calls.place(area) as found:
        yield found


@pytest.fixture
def engine(kernel_overlay: None, place: Place) -> Iterator[Podman]:
    for program in ("podman", "skopeo", "runc", "busybox"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed; scripts/test --clients installs what these tests need")
    # podman refuses a runroot of more than 50 characters
    with tempfile.TemporaryDirectory(prefix="ufs-", dir="/run") as runtime:
        found = Podman(place.root / "engine", Path(runtime))
        try:
            found.build()
            yield found
        finally:
            found.close()


@contextmanager
def mounted(place: Place, image: str, *words: str | Path) -> Iterator[Path]:
    root = {"UNIONFS_ROOT": str(place.root / "storage")}
    succeed(cli_calls.unionfs("mount", "--image", image, *words, place.merged, env=root))
    yield place.merged
    done = cli_calls.unionfs("umount", place.merged)
    # A process that has unshared its mount namespace meanwhile has a copy of the mount.
    assert done.returncode == 0 or "in use elsewhere (a mount namespace" in done.stderr, done.stderr


def commit(place: Place, image: str, compress: str) -> None:
    root = {"UNIONFS_ROOT": str(place.root / "storage")}
    succeed(cli_calls.unionfs("commit", place.merged, "--image", image, "--compress", compress, env=root))


def test_what_podman_and_skopeo_write(engine: Podman, place: Place) -> None:
    wanted = engine.tree("app")
    saves = place.root / "saves"
    saves.mkdir()
    references = []
    for form in ("oci-archive", "docker-archive", "oci-dir"):
        engine.podman("save", "-q", "--format", form, "-o", saves / form, "app")
        references.append(f"{form.replace('-dir', '')}:{saves / form}")
    source = references[0]
    for form in ("oci-archive", "docker-archive", "oci"):
        references.append(f"{form}:{saves}/skopeo-{form}")
        engine.skopeo(source, f"{references[-1]}:app:1")
    for kind in ("gzip", "zstd"):
        references.append(f"oci:{saves}/skopeo-{kind}")
        engine.skopeo(
            f"docker-archive:{saves}/docker-archive", f"{references[-1]}:x", "--dest-compress-format", kind
        )
    for reference in references:
        with mounted(place, reference) as root:
            assert difference(without_root(shown(root)), wanted) == {}, reference
    # All of them have the same layers.
    layers = {path.name for path in (place.root / "storage/images/layers/trusted").iterdir()}
    (details,) = json.loads(engine.podman("image", "inspect", "app"))
    assert {f"sha256:{name}" for name in layers} == set(details["RootFS"]["Layers"])


@pytest.mark.parametrize("compress", ["gzip", "zstd", "none"])
def test_what_unionfs_commits(compress: str, engine: Podman, place: Place) -> None:
    engine.podman("save", "-q", "--format", "oci-archive", "-o", place.root / "app.tar", "app")
    target = f"oci-archive:{place.root}/new.tar"
    with mounted(place, f"oci-archive:{place.root}/app.tar", "-u", place.upper, "-w", place.work) as root:
        (root / "d").rename(root / "d2")
        (root / "d2/z").unlink()
        (root / "renamed/f").chmod(0o600)
        shutil.rmtree(root / "tmp")
        (root / "tmp").mkdir()
        (root / "tmp/new").write_bytes(os.urandom(300_000))
        os.chown(root / "tmp/new", 12345, 54321)
        os.setxattr(root / "tmp/new", "user.k", b"v")
        commit(place, f"{target}:localhost/new:1", compress)
        wanted = without_root(shown(root))
    engine.podman("load", "-q", "-i", place.root / "new.tar")
    assert difference(engine.tree("localhost/new:1"), wanted) == {}
    config = json.loads(engine.podman("image", "inspect", "localhost/new:1"))[0]["Config"]
    assert (config["User"], config["Cmd"]) == ("1000:1001", ["/bin/id"])
    engine.skopeo(f"{target}:localhost/new:1", f"oci:{place.root}/copied:1")
    with mounted(place, f"oci:{place.root}/copied:1") as root:
        assert difference(without_root(shown(root)), wanted) == {}
    if compress != "zstd":  # docker's format has none
        engine.skopeo(f"{target}:localhost/new:1", f"docker-archive:{place.root}/copied.tar:x:1")
        with mounted(place, f"docker-archive:{place.root}/copied.tar") as root:
            assert difference(without_root(shown(root)), wanted) == {}


def test_a_container_of_a_committed_image_runs(engine: Podman, place: Place) -> None:
    engine.podman("save", "-q", "--format", "oci-archive", "-o", place.root / "app.tar", "app")
    with mounted(place, f"oci-archive:{place.root}/app.tar", "-u", "tmpfs") as root:
        (root / "made").write_text("by unionfs\n")
        commit(place, f"oci-archive:{place.root}/new.tar:localhost/new:1", "gzip")
    engine.podman("load", "-q", "-i", place.root / "new.tar")
    said = engine.podman("run", "--rm", "--network", "host", "localhost/new:1", "cat", "/made")
    assert said.endswith("by unionfs\n")


def test_an_exported_layer_over_its_base(engine: Podman, place: Place) -> None:
    """umoci and other tools put a layer's file into an image; GNU tar lists the same names."""
    engine.podman("save", "-q", "--format", "oci-archive", "-o", place.root / "app.tar", "app")
    with mounted(place, f"oci-archive:{place.root}/app.tar", "-u", place.upper, "-w", place.work) as root:
        (root / "d/z").unlink()
    written = export_layer(str(place.upper), [], str(place.root / "layer.tar.gz"), userxattr=False)
    listing = subprocess.run(
        ["tar", "tzf", place.root / "layer.tar.gz"], check=True, capture_output=True, text=True
    ).stdout.split()
    assert listing == ["./", "./d/", "./d/.wh.z"]
    total = run("sha256sum", place.root / "layer.tar.gz").split()[0]
    assert written.digest == f"sha256:{total}"
