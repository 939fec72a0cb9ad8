"""What photo servers, archives and file managers leave beside pictures. No reader takes it for data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Whole names in lower case. Some of them hold reduced copies of the pictures beside them, under the pictures' names.
LITTER = frozenset(
    (
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", ".@__thumb"),  # Synology, QNAP
        *("__macosx", ".ds_store", ".trashes", ".fseventsd", ".spotlight-v100", "icon\r"),  # macOS
        *("network trash folder", "temporary items", ".temporaryitems", ".appledouble"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
        *("$recycle.bin", "system volume information"),
        *(".thumbnails", ".directory", "lost+found"),  # Linux
        *("picasa.ini", ".picasa.ini", ".picasaoriginals", "zbthumbnail.info"),
        *("__pycache__", ".ipynb_checkpoints"),
    )
)
APPLE_DOUBLE = "._"  # begins the names of files in which macOS keeps what other file systems cannot hold


def reason(name: str) -> str | None:
    """Why a file or folder of this name is passed over; None for one that may be data.

    >>> [reason(name) for name in ("@eaDir", "._cat.jpg", "Thumbs.db", ".git", "cat.jpg")]
    ['litter', 'litter', 'litter', 'hidden', None]
    """
    if name.lower() in LITTER or name.startswith(APPLE_DOUBLE):
        return "litter"
    return "hidden" if name.startswith(".") else None


def summary(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, by the reasons' names.

    >>> summary(["litter", "hidden", "litter"])
    {'hidden': 1, 'litter': 2}
    """
    counts: dict[str, int] = {}
    for one in sorted(reasons):
        counts[one] = counts.get(one, 0) + 1
    return counts


def worded(passed_over: Mapping[str, int]) -> str:
    """The counts of `summary` as text.

    >>> worded({"hidden": 1, "litter": 2})
    '1 hidden, 2 litter'
    """
    return ", ".join(f"{count:,} {why}" for why, count in passed_over.items())
