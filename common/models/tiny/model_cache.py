"""Models that a recipe builds: made once, kept under a name that says which code made them.

Those of the present code lie in the repository: building takes minutes, and every processor rounds in its own way.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def syntax_hash(sources: Iterable[Path]) -> str:
    """12 hexadecimal digits that change with the code of the modules, comments, docstrings and layout aside."""
    code = [ast.dump(_without_docstrings(ast.parse(path.read_text(encoding="utf-8")))) for path in sources]
    return hashlib.sha256("".join(code).encode()).hexdigest()[:12]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def place(name: str, sources: Iterable[Path], shipped: Path, cache: Path) -> Path:
    """Where the model of this code lies: among those of the repository if it is there, else in the cache.

    Args:
        name: Of the recipe.
        sources: Its code.
        shipped: The repository's folder of models.
        cache: Where others are built.
    """
    folder = f"{name}-{syntax_hash(sources)}"
    return shipped / folder if (shipped / folder).is_dir() else cache / folder


def build_once(folder: Path, save: Callable[[Path], None]) -> Path:
    """A folder that `save` fills, unless it is there already; whole or not at all, also with several processes at it.

    Args:
        folder: Where it shall lie.
        save: Writes the content into an empty folder.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    try:
        save(unfinished)
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # else another process finished the same recipe first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # renamed, if all went well
    return folder
