"""The console script `fewshot`: one name for the commands of an installed copy.

    fewshot train method=clsrl data=dtd shots=4     what `python run.py` does, with all of Hydra's flags
    fewshot predict outputs/<run> photo.jpg         what `python -m common.predict` does; the others alike

From a checkout, `python run.py` and `python -m common.<command>` need no installation.
"""

from __future__ import annotations

import argparse
import re
import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from common import __version__
from common.runtime import process

# module, function and help by command; a module is imported only when its command is called
COMMANDS = {
    "train": ("run", "run", "train and evaluate a configuration, or a sweep of them (-m)"),
    "doctor": ("run", "run", "examine a training before it starts: would it learn, fit and end in time?"),
    "predict": ("common.predict.__main__", "main", "classify pictures with a finished run"),
    "serve": ("common.serve.__main__", "main", "a local page that classifies dropped photos"),
    "export": ("common.export.__main__", "main", "write trained weights into a folder for others"),
    "report": ("common.report.__main__", "main", "tables, pages and figures of finished runs"),
    "data-check": ("common.data.check", "command", "which datasets are there and complete?"),
}


def main() -> None:
    """Run one command with the remaining arguments and exit with its exit code."""
    process.ensure_utf8()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(f"fewshot {__version__}")
        return
    if name not in COMMANDS:
        sys.exit(f"error: fewshot {name} is no command; choose {', '.join(COMMANDS)}")
    # like `python -m`, so that a user's own rewards and methods in the working directory can be imported
    sys.path.insert(0, str(Path.cwd()))
    module, function, _ = COMMANDS[name]
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:], *(["doctor=true"] if name == "doctor" else [])]
    sys.exit(getattr(import_module(module), function)())


class CommandParser(argparse.ArgumentParser):
    """Parser of a command's arguments whose error says which option an unknown one may mean."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments:.*?(--[^\s=]+)", message)
        known = [option for action in self._actions for option in action.option_strings]
        if unknown and (close := get_close_matches(unknown[1], known, 1)):
            message += f"; did you mean {close[0]}?"
        super().error(message)


def program(command: str) -> str:
    """Return how a command was called, for its usage line."""
    called_by_script = Path(sys.argv[0]).name.startswith("fewshot")
    return f"fewshot {command}" if called_by_script else f"python -m common.{command.replace('-', '.')}"


def usage() -> str:
    """Return the help text: every command with a description."""
    lines = [f"  fewshot {name:<12} {what}" for name, (_, _, what) in COMMANDS.items()]
    return "\n".join([str(__doc__).splitlines()[0], "", *lines, "", "Each has --help; --version prints the version."])
