"""Names that have changed. Whoever still uses an old one gets one line that says the new one."""

from __future__ import annotations

from collections.abc import Mapping

# Config keys and options, `old.key` or `group=old_option`, to what is written instead, or to a sentence.
RENAMED: dict[str, str] = {}
# Dotted paths of modules, functions and classes that a configuration may name, to where they are now.
MOVED: dict[str, str] = {
    "common.models.tiny": "common.models.tiny.recipe",
    "alert.tiny_gemma3": "alert.tiny.recipe",
}


def successor(name: str, table: Mapping[str, str]) -> str | None:
    """What stands for an old name today, or None. An entry also covers what lies below it.

    >>> successor("trainer.optimizer.lr", {"trainer.optimizer": "optimizer"})
    'optimizer.lr'
    >>> successor("trainer.lr", {"trainer.lr": "no longer a key: the schedule says it"})
    'no longer a key: the schedule says it'
    >>> successor("tiny.recipe", {"tiny": "tiny.recipe"})  # is the new one
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        new = table.get(".".join(parts[:length]))
        if new is not None and not (length < len(parts) and new.startswith(f"{'.'.join(parts[:length])}.")):
            return new if " " in new else ".".join([new, *parts[length:]])
    return None
