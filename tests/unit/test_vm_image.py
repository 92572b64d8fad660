"""Creation and selection of virtual machines, as far as testable without one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from scripts.lib.vm import __main__ as command_line
from scripts.lib.vm import host, image, initrd, machine, zfs
from scripts.lib.vm.errors import VmError


def _modules(root: Path, dependencies: str, builtin: str = "") -> Path:
    root.mkdir()
    (root / "modules.dep").write_text(dependencies)
    (root / "modules.builtin").write_text(builtin)
    return root


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    modules = _modules(
        tmp_path / "m",
        "kernel/a/virtio-pci.ko.xz: kernel/b/modern.ko.xz kernel/c/virtio_ring.ko.xz kernel/c/virtio.ko.xz\n"
        "kernel/a/virtio_blk.ko.xz: kernel/c/virtio.ko.xz\n"
        "kernel/b/modern.ko.xz:\nkernel/c/virtio_ring.ko.xz: kernel/c/virtio.ko.xz\nkernel/c/virtio.ko.xz:\n",
        "kernel/fs/ext4.ko\n",
    )
    assert [Path(name).name for name in initrd.module_order(modules)] == [
        "virtio.ko.xz", "virtio_ring.ko.xz", "modern.ko.xz", "virtio-pci.ko.xz", "virtio_blk.ko.xz",
    ]  # fmt: skip


def test_a_kernel_that_cannot_reach_its_disk(tmp_path: Path) -> None:
    modules = _modules(tmp_path / "m", "", "kernel/fs/ext4.ko\n")
    with pytest.raises(VmError, match="no module virtio_pci"):
        initrd.module_order(modules)


def test_the_host_s_kernel(tmp_path: Path) -> None:
    boot, lib = tmp_path / "boot", tmp_path / "modules"
    boot.mkdir()
    (lib / "5.5").mkdir(parents=True)
    with pytest.raises(VmError, match=r"vmlinuz-5.5 and .*/5.5/modules.dep are missing"):
        image.host_kernel(tmp_path, "5.5", str(boot), str(lib))
    (boot / "vmlinuz-5.5").touch()
    with pytest.raises(VmError, match=r"/5.5/modules.dep is missing"):
        image.host_kernel(tmp_path, "5.5", str(boot), str(lib))
    (lib / "5.5/modules.dep").touch()
    found = image.host_kernel(tmp_path, "5.5", str(boot), str(lib))
    assert (found.image, found.modules) == (boot / "vmlinuz-5.5", lib / "5.5")


def test_another_list_of_packages_is_another_image() -> None:
    key = image._key("trixie", ["a", "b"])
    assert key == image._key("trixie", ["a", "b"])
    assert len({key, image._key("trixie", ["a"]), image._key("bookworm", ["a", "b"])}) == 3


def test_what_fails_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def build(suite: str, packages: object, home: Path) -> None:
        (home / "root").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(image, "_build", build)
    left = image.cache() / "partial-bookworm-killed"
    left.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), image.image("6.1", ["a"]):
        pass
    assert os.listdir(image.cache()) == ["bookworm.lock"]


def test_only_root_makes_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(VmError, match="only root"), image.image("6.1", ["a"]):
        pass


def test_zfs_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = image.Kernel("6.1", tmp_path / "vmlinuz", tmp_path / "modules", tmp_path / "root.ext4")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(VmError, match="only root"):
        zfs.built(kernel)
    (tmp_path / "zfs.tar").touch()
    assert zfs.built(kernel) == tmp_path / "zfs.tar"


@pytest.mark.parametrize("words", [("--kernel", "host"), ("--power-cut", "1")])
def test_where_zfs_cannot_be(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["vm-test", "--packages", "", "--zfs", *words])
    with pytest.raises(SystemExit, match="2"):
        command_line.main()


def test_the_workplaces_of_killed_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (image.cache() / "run-killed/vm").mkdir(parents=True)
    with machine.workplace() as one, machine.workplace() as other:
        assert {path.name for path in image.cache().iterdir()} == {one.name, other.name}
    assert os.listdir(image.cache()) == []


@pytest.mark.parametrize(("accel", "works"), [("kvm", True), ("tcg", True), ("xen", False)])
def test_acceleration_can_be_chosen(accel: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIONFS_VM_ACCEL", accel)
    if works:
        assert machine.acceleration() == accel
    else:
        with pytest.raises(VmError, match="kvm or tcg"):
            machine.acceleration()


def test_pip_s_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Network settings go into a chroot; settings that name directories of this machine do not."""
    certificate = tmp_path / "certificate.pem"
    certificate.touch()
    lines = (
        ":env:.cert='{certificate}'\n"
        "global.extra-index-url='file:///opt/index\\nhttps://one.example/simple https://two.example/simple'\n"
        "global.find-links='/opt/wheels'\nglobal.index-url='/opt/index'\nglobal.constraint='/etc/c'\n"
        "freeze.timeout='10'\n"
    ).replace("{certificate}", str(certificate)).replace("\\n", " ")
    monkeypatch.setattr(host, "_output", lambda *command: lines)
    for name in host._PROXIES:
        monkeypatch.delenv(name, raising=False)
    environment, files = host.pip_settings()
    assert environment == {
        "PIP_CERT": str(certificate),
        "PIP_EXTRA_INDEX_URL": "https://one.example/simple https://two.example/simple",
    }
    assert files == [certificate]


def test_the_source_is_what_git_knows_and_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "r"
    repository.mkdir()

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", repository, *words], check=True, capture_output=True)

    git("init")
    for name in ("kept", "removed", "new", "ignored"):
        (repository / name).write_text(name)
    (repository / ".gitignore").write_text("ignored\n")
    git("add", "kept", "removed")
    (repository / "removed").unlink()
    monkeypatch.setattr(machine, "REPOSITORY", repository)
    machine.pack_source(tmp_path / "source.tar")
    listed = subprocess.run(["tar", "tf", tmp_path / "source.tar"], check=True, capture_output=True)
    assert sorted(listed.stdout.decode().split()) == [".gitignore", "kept", "new"]
