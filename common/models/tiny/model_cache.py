"""Cache for models that a recipe builds; the folder name contains a hash of the recipe's code.

Models of the current code are part of the repository: building takes minutes, and processors differ in rounding.
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
    """Return 12 hexadecimal digits that change with the code of the modules: not comments, docstrings or imports."""
    code = [ast.dump(_code_alone(ast.parse(path.read_text(encoding="utf-8")))) for path in sources]
    return hashlib.sha256("".join(code).encode()).hexdigest()[:12]


def _code_alone(tree: ast.Module) -> ast.Module:
    """Drop what decides no weight, so that a moved or better described module does not ask for new models."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    tree.body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    return tree


def place(name: str, sources: Iterable[Path], shipped: Path, cache: Path) -> Path:
    """Return the folder of a recipe's model: in the repository if it is there, else in the cache.

    Args:
        name: Name of the recipe.
        sources: Files with its code.
        shipped: Folder of models in the repository.
        cache: Folder where other models are built.
    """
    folder = f"{name}-{syntax_hash(sources)}"
    return shipped / folder if (shipped / folder).is_dir() else cache / folder


def build_once(folder: Path, save: Callable[[Path], None]) -> Path:
    """Fill a folder by `save` unless it exists, and return it. Safe with several processes; never half-written.

    Args:
        folder: Folder to create.
        save: Function that writes the content into an empty folder.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # build beside the target, then rename: within a file system that is atomic
    unfinished = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    try:
        save(unfinished)
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process has built the same model meanwhile
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # already gone if it was renamed
    return folder
