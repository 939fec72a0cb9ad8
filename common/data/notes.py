"""What a result says about its data: what was passed over, left out, replaced, and there twice. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from common.counted import agree, counted
from common.data.duplicates import WORDS
from common.data.litter import worded

SHOWN = 10  # bad pictures that are named


def passed_over(facts: Mapping[str, Any]) -> list[str]:
    """A line about files and folders that were no data, from a manifest or a result; none if there were none.

    >>> passed_over({"passed_over": {"litter": 2, "unknown suffix": 1}})
    ['passed over in the folders of the data: 2 litter, 1 unknown suffix']
    """
    reasons = facts.get("passed_over")
    return [f"passed over in the folders of the data: {worded(reasons)}"] if reasons else []


def unusable(bad: Mapping[str, str]) -> str:
    """Pictures that cannot be used, each with its reason; of many the first, and how often each reason occurs."""
    shown = ", ".join(f"{image} ({reason})" for image, reason in list(bad.items())[:SHOWN])
    if len(bad) <= SHOWN:
        return shown
    reasons = Counter(bad.values()).most_common(3)
    return f"{shown} and {len(bad) - SHOWN:,} more (of all: {', '.join(f'{n:,} {reason}' for reason, n in reasons)})"


def treated(counts: Mapping[str, int], background: str) -> list[str]:
    """A line for each kind of pictures that are not shown as they are stored (see `rgb.to_rgb`).

    >>> treated({"transparent": 1, "stretched": 2}, "white")  # doctest: +NORMALIZE_WHITESPACE
    ['transparent parts of 1 picture are shown on white (data.background)',
     '16-bit levels of 2 pictures use a part of their range, and are stretched to the whole']
    """
    said = {
        "transparent": f"transparent parts of {{}} are shown on {background} (data.background)",
        "stretched": "16-bit levels of {} use a part of their range, and are stretched to the whole",
    }
    return [said[kind].format(_pictures(n)) for kind, n in counts.items()]


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' * (count != 1)}"


def of_manifest(facts: Mapping[str, Any]) -> list[str]:
    """What a manifest says of how the data was read; which pictures are there twice has a line of its own."""
    bad = facts.get("unusable", {})
    left_out = f"left out {_pictures(len(bad))} that cannot be used: {unusable(bad)}; manifest.json names all"
    return [
        *([left_out] if bad else []),
        *passed_over(facts),
        *facts.get("notes", []),
        *treated(facts.get("treated", {}), facts.get("background", "")),
    ]


def data_lines(facts: Mapping[str, Any]) -> list[str]:
    """All that a reader of a result should know of its data; results of older runs lack some of the entries."""
    lines = passed_over(facts)
    if replaced := sum(facts.get("refilled", {}).values()):
        lines.append(
            f"{counted(replaced, 'training picture')} {agree(replaced, 'was', 'were')} replaced by "
            + agree(replaced, "another of its class, since it", "others of their class, since they")
            + " cannot be decoded"
        )
    for kind, count in facts.get("duplicates", {}).items():
        lines.append(f"{WORDS[kind]}: {count} (manifest.json lists them)")
    return lines
