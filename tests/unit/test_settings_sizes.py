"""Human-readable sizes; the expected values are those of docker (go-units) and of tmpfs(5)."""

from __future__ import annotations

import pytest

from unionfs.errors import UserError
from unionfs.settings import sizes

K, M, G = 1 << 10, 1 << 20, 1 << 30
LARGEST = 2**63 - 1  # of an off_t


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("4096b", 4096), ("64k", 64 * K), ("64K", 64 * K), ("64kb", 64 * K),
        ("64KiB", 64 * K), ("64 m", 64 * M), ("1.5g", 3 * G // 2), ("0.5b", 0), ("2t", 2 << 40),
        ("1p", 1 << 50), (str(LARGEST), LARGEST),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert sizes.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "m", "-1", "1x", "1,5g", "1.g", "64  m", "64 ", "8192p", str(LARGEST + 1)]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="^" + text.replace(".", r"\.") + "$"):
        sizes.parse_size(text)


def test_sizes_of_volumes() -> None:
    """At least one byte, and less than 1 EiB."""
    assert sizes.volume_size(" 100m ") == 100 * M
    assert sizes.volume_size("1") == 1
    assert sizes.volume_size(str((1 << 60) - 1)) == (1 << 60) - 1
    for text in ("0", str(1 << 60)):
        with pytest.raises(UserError, match=f"size={text} is not a possible size for a volume"):
            sizes.volume_size(text)
    with pytest.raises(UserError, match="invalid limit 'lots'"):
        sizes.volume_size("lots", "limit")


def test_sizes_of_tmpfs() -> None:
    assert sizes.parse_tmpfs_size("64m") == str(64 * M)
    assert sizes.parse_tmpfs_size("0") == "0"
    assert [sizes.parse_tmpfs_size(text) for text in ("1%", "050%", "100%")] == ["1%", "50%", "100%"]
    for text in ("0%", "101%", "1000%", "%", "5 %"):
        with pytest.raises(ValueError, match=text):
            sizes.parse_tmpfs_size(text)


def test_counts() -> None:
    found = [sizes.parse_count(text) for text in ("0", "7", "2k", "2K", "3m", "1g", str(LARGEST))]
    assert found == ["0", "7", str(2 * K), str(2 * K), str(3 * M), str(G), str(LARGEST)]
    for text in ("", "k", "1t", "1.5k", "-1", str(LARGEST + 1)):
        with pytest.raises(ValueError, match=f"^{text}$"):
            sizes.parse_count(text)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0B"), (999, "999B"), (1000, "1kB"), (1234, "1.234kB"), (999_999, "1000kB"), (10**6, "1MB"),
        (1_500_000_000, "1.5GB"), (10**12, "1TB"), (10**15, "1PB"), (5 * 10**18, "5000PB"),
    ],
)  # fmt: skip
def test_sizes_that_are_shown(size: int, shown: str) -> None:
    """As in HumanSize: four digits, powers of 1000."""
    assert sizes.shown_size(size) == shown
