"""What a result says about its data: what was passed over, left out, replaced, and there twice. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.counted import agree, counted
from common.data.duplicates import WORDS
from common.data.litter import worded


def passed_over(facts: Mapping[str, Any]) -> list[str]:
    """A line about files and folders that were no data, from a manifest or a result; none if there were none.

    >>> passed_over({"passed_over": {"litter": 2, "unknown suffix": 1}})
    ['passed over in the folders of the data: 2 litter, 1 unknown suffix']
    """
    reasons = facts.get("passed_over")
    return [f"passed over in the folders of the data: {worded(reasons)}"] if reasons else []


def data_lines(facts: Mapping[str, Any]) -> list[str]:
    """All that a reader of a result should know of its data; results of older runs lack some of the entries."""
    lines = passed_over(facts)
    if replaced := sum(facts.get("refilled", {}).values()):
        many, were = counted(replaced, "training picture"), agree(replaced, "was", "were")
        others = agree(replaced, "another of its class, since it", "others of their class, since they")
        lines.append(f"{many} {were} replaced by {others} cannot be decoded")
    for kind, count in facts.get("duplicates", {}).items():
        lines.append(f"{WORDS[kind]}: {count} (manifest.json lists them)")
    return lines
