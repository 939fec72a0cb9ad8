"""Export what a run has trained as a folder for others, with a model card.

python -m common.export outputs/<run> <new folder>                    whole weights, for transformers and vLLM
python -m common.export outputs/<run> <new folder> --as adapter       LoRA's adapters alone; or bank, ALERT's embeddings
python -m common.export outputs/<run> <new folder> --as onnx          few-shot learner and encoder; or torchscript
python -m common.export outputs/<run> <new folder> --push me/birds    shows what would go to the hub; --yes sends it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.cli import CommandParser, program
from common.export import card
from common.runtime import process
from common.runtime.progress import watched
from common.types import UserError

KINDS = ("model", "adapter", "bank", "onnx", "torchscript")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after a user's error."""
    parser = CommandParser(
        prog=program("export"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--as", dest="kind", choices=KINDS, help="what to write (model; of few-shot learners onnx)")
    parser.add_argument("--trust-code", action="store_true", help="run code of other packages that the folder names")
    parser.add_argument("--licence", help="of the weights, as the hub spells it; otherwise that of their base")
    parser.add_argument("--push", metavar="OWNER/NAME", help="show what would be sent to the hub")
    parser.add_argument("--public", action="store_true", help="for everybody to see; otherwise private")
    parser.add_argument("--yes", action="store_true", help="send it")
    chosen = parser.parse_args(arguments)
    try:
        with watched(f"exporting {chosen.run}"):
            export_or_show(chosen)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export_or_show(chosen: argparse.Namespace) -> None:
    """Export, show what would be sent to the hub, or send it.

    Raises:
        UserError: The request cannot be fulfilled.
    """
    if chosen.push is not None:
        card.check_name(chosen.push)
    run, folder = chosen.run.expanduser(), chosen.folder.expanduser()
    if chosen.push is None or not (folder / "README.md").is_file():  # else it was exported by an earlier call
        from common.export.bundle import export  # imports torch, which takes seconds
        from common.launch import quiet_libraries

        quiet_libraries()
        export(run, folder, chosen.kind, chosen.licence, chosen.trust_code)
        print(f"wrote {folder}; its README.md says how to ask it")
    else:
        card.check_card(folder, run)
    if chosen.push is not None:
        print(card.plan(folder, chosen.push))
        print(card.push(folder, chosen.push, not chosen.public) if chosen.yes else "nothing was sent; --yes sends it")


if __name__ == "__main__":
    process.ensure_utf8()
    sys.exit(main())
