"""An image as the lowers of a mount, whether in the store or outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from unionfs.daemon import live
from unionfs.errors import quoted
from unionfs.images.rules import Rules
from unionfs.images.sources import is_reference, opened
from unionfs.images.store import Image, Store, kind_of, shown
from unionfs.storage.archive.progress import UNSEEN, Progress
from unionfs.storage.measuring import Use


@contextmanager
def image_layers(
    text: str, root: str, *, userxattr: bool, rules: Rules, notes: list[str], progress: Progress = UNSEEN
) -> Iterator[tuple[Image, list[str]]]:
    """The image that `text` names, and its layers as lowers, topmost first; unpacked first if necessary.

    Nobody removes the layers during the context, nor later while a mount of this user has them. `notes`
    receives sentences about what was left out. Raises UserError.
    """
    store, kind = Store(root), kind_of(userxattr)
    if is_reference(text):
        with opened(text, rules) as source, store.added(source, kind, rules, notes, progress) as found:
            yield found
    else:
        image = store.find(text)
        with store.used(image, kind) as paths:
            yield image, paths


def users_of_layers(kept: Mapping[str, str]) -> dict[str, str]:
    """Who uses directories as lowers: this user's mounts, and `kept`."""
    found = dict(kept)
    for entry in live.entries():
        for lower in entry.settings.lowers:
            found[lower] = f"the mount {quoted(entry.settings.mountpoint)}"
    return found


def uses(root: str, kept: Mapping[str, str]) -> list[Use]:
    """The images of the store; a layer that several have counts for the first. Active are those in use."""
    store, users = Store(root), users_of_layers(kept)
    found, counted = [], set[tuple[str, str]]()
    layers = store.all_layers()
    for image in store.images():
        own = [layer for layer in layers if layer[1] in image.layers]
        size = sum(int(store.facts(*layer)["size"]) for layer in own if layer not in counted)
        counted.update(own)
        found.append(Use(shown(image), size, any(store.layer(*layer) in users for layer in own)))
    return found
