"""`unionfs image`: the images that were unpacked for mounts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from unionfs.cli.common import for_each, print_json, print_table, root_option, tell
from unionfs.cli.lazy import LazyGroup
from unionfs.cli.progress import progress_option, shown_progress
from unionfs.cli.rules import complete_images, rules_options
from unionfs.settings.sizes import shown_size
from unionfs.settings.words import in_table, moment

if TYPE_CHECKING:
    from unionfs.images.rules import Rules
    from unionfs.images.store import Image, Store

_COMMANDS = {
    "import": ("unionfs.cli.image:import_", "Unpack an image."),
    "ls": ("unionfs.cli.image:ls", "List images."),
    "inspect": ("unionfs.cli.image:inspect", "Show details of images."),
    "rm": ("unionfs.cli.image:rm", "Remove images."),
    "prune": ("unionfs.cli.image:prune", "Remove what no image and no mount needs."),
}


@click.command(
    cls=LazyGroup,
    places=_COMMANDS,
    aliases={"list": "ls", "remove": "rm"},
    epilog="Example: unionfs image import oci-archive:debian.tar",
)
def image() -> None:
    """Manage the images that were unpacked by `mount --image` and `run --image`.

    \b
    An image outside is named as in skopeo and podman:
      oci-archive:FILE[:TAG]      docker-archive:FILE[:NAME]      oci:DIR[:TAG]
    For images in registries: `skopeo copy docker://NAME oci-archive:FILE`.

    Each layer is unpacked once, checked against its digests, and shared by all mounts. Layers and images are
    in the directory `images` of the storage root.
    """


def _store(root: str | None) -> Store:
    # For start-up time: --help and completion do not need it.
    from unionfs.images.store import Store
    from unionfs.storage.root import storage_root

    return Store(storage_root(root))


def _users(root: str | None) -> dict[str, str]:
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.store import lowers_of_all
    from unionfs.images.using import users_of_layers
    from unionfs.storage.root import storage_root

    return users_of_layers(lowers_of_all(storage_root(root)))


@click.command(name="import", epilog="Example: unionfs image import docker-archive:web.tar")
@rules_options
@progress_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@root_option
@click.argument("source", metavar="IMAGE", shell_complete=complete_images)
def import_(rules: Rules, progress: str, as_json: bool, root: str | None, source: str) -> int:
    """Unpack IMAGE into the store, and print its id.

    An untrusted layer cannot write outside its directory, or fill the disk beyond the limits below. As an
    ordinary user, all files belong to you, and device files are refused without --skip-devices.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.images.using import image_layers
    from unionfs.storage.root import storage_root
    from unionfs.sys.capabilities import may_use_trusted_xattrs

    notes: list[str] = []
    userxattr = not may_use_trusted_xattrs()
    with shown_progress(f"unpacking {source}", progress) as shown, image_layers(
        source, storage_root(root), userxattr=userxattr, rules=rules, notes=notes, progress=shown
    ) as found:
        pass
    if as_json:
        print_json({"id": found[0].id, "names": list(found[0].names), "notes": notes})
        return 0
    print(found[0].id)
    tell(*notes)
    return 0


@click.command(epilog="Example: unionfs image ls -q")
@click.option("-q", "--quiet", is_flag=True, help="Print ids only.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@root_option
def ls(quiet: bool, as_json: bool, root: str | None) -> None:
    """List the images of the store, oldest first. The size is that of the unpacked layers' files."""
    store = _store(root)
    found = store.images()
    if as_json:
        print_json([_details(store, one, {}) for one in found])
    elif quiet:
        for one in found:
            print(one.id)
    else:
        rows = [
            (
                name, one.id[:12], str(len(one.layers)), shown_size(_size(store, one)),
                in_table(moment(one.added)),
            )
            for one in found
            for name in (one.names or ("<none>",))
        ]  # fmt: skip
        print_table(("NAME", "ID", "LAYERS", "SIZE", "ADDED"), rows)


def _size(store: Store, image: Image) -> int:
    """The bytes of its files, each layer counted once."""
    sizes: dict[str, int] = {}
    for kind, name in store.all_layers():
        if name in image.layers:
            sizes[name] = int(store.facts(kind, name)["size"])
    return sum(sizes.values())


def _details(store: Store, one: Image, users: dict[str, str]) -> dict[str, Any]:
    layers = []
    for diff_id in one.layers:
        places = {kind: store.layer(kind, diff_id) for kind, name in store.all_layers() if name == diff_id}
        facts = [store.facts(kind, diff_id) for kind in places]
        layers.append({
            "DiffId": f"sha256:{diff_id}",
            "Paths": list(places.values()),
            "Digest": facts[0]["digest"] if facts else None,
            "Entries": facts[0]["entries"] if facts else None,
            "Size": facts[0]["size"] if facts else None,
            "UsedBy": sorted({users[path] for path in places.values() if path in users}),
        })
    return {
        "Id": f"sha256:{one.id}",
        "Names": list(one.names),
        "Source": one.source,
        "Added": moment(one.added),
        "Size": _size(store, one),
        "Layers": layers,
    }


@click.command(epilog="Example: unionfs image inspect debian:12")
@root_option
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True, shell_complete=complete_images)
def inspect(root: str | None, names: tuple[str, ...]) -> None:
    """Print what is known about images of the store as a JSON array: layers, their users, configuration."""
    store, users = _store(root), _users(root)
    found = [store.find(name) for name in names]
    print_json([{**_details(store, one, users), "Config": json.loads(one.config)} for one in found])


@click.command(epilog="Example: unionfs image rm debian:12")
@root_option
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True, shell_complete=complete_images)
def rm(root: str | None, names: tuple[str, ...]) -> int:
    """Remove images of the store with the layers that no other image has, and print their names.

    An image that a mount or a kept container uses is not removed.
    """
    store = _store(root)

    def remove(name: str) -> bool:
        store.remove([store.find(name)], _users(root))
        return True

    return for_each(names, remove)


@click.command(epilog="Example: unionfs image prune --all")
@click.option("-a", "--all", "every", is_flag=True, help="Also remove every image that nothing uses.")
@root_option
def prune(every: bool, root: str | None) -> None:
    """Remove layers that belong to no image, and what killed processes left; print their directories."""
    store, users = _store(root), _users(root)
    gone = []
    if every:
        for one in store.images():
            layers = [store.layer(*layer) for layer in store.all_layers() if layer[1] in one.layers]
            if not users.keys() & set(layers):
                gone += store.remove([one], users)
    for path in (*gone, *store.prune(users)):
        print(path)
