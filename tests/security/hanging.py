"""A filesystem that never answers: `hanging.py MOUNTPOINT` prints "up", and then blocks in every request."""

from __future__ import annotations

import sys

import pyfuse3
import trio


class _Hanging(pyfuse3.Operations):
    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        await trio.sleep_forever()
        raise AssertionError


async def _serve() -> None:
    print("up", flush=True)
    await pyfuse3.main()


def main() -> None:
    """Serve until killed."""
    pyfuse3.init(_Hanging(), sys.argv[1], {*pyfuse3.default_options, "allow_other"})
    trio.run(_serve)


if __name__ == "__main__":
    main()
