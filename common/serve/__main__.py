"""Serve a local page for a finished run: drop photos, see answers with probabilities and reasoning, correct them.

python -m common.serve outputs/<run>                           http://127.0.0.1:7860, only on this machine
python -m common.serve outputs/<run> --risk 0.05               abstains if it would be wrong too often
python -m common.serve outputs/<run> --host 0.0.0.0            for the whole network; there is no password
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path

from common.cli import CommandParser, program
from common.runtime import process
from common.runtime.progress import watched
from common.types import UserError

LOCAL = ("127.0.0.1", "localhost", "::1")  # addresses that only this machine can reach


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 after Ctrl-C, or 2 after a user's error."""
    parser = CommandParser(
        prog=program("serve"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--names", help="other class names, separated by commas, for methods that only read them")
    parser.add_argument("--risk", type=float, help="abstain so that about this share of the answers is wrong")
    parser.add_argument(
        "--unknown", type=float, help="call so many of the known photos unknown, to notice other classes"
    )
    parser.add_argument("--data", type=Path, help="folder in which the run's own dataset lies now, if it was moved")
    parser.add_argument("--trust-code", action="store_true", help="run code of other packages that the folder names")
    parser.add_argument("--feedback", type=Path, default=Path("feedback"), help="folder of corrected pictures")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-mb", type=float, default=20.0, help="largest picture that is taken")
    chosen = parser.parse_args(arguments)
    process.set_thread_policy()
    try:
        # checked first: loading the model takes much longer
        if find_spec("gradio") is None:
            raise UserError("the page needs Gradio, the extra `serve`: uv pip install 'gradio>=6.31,<7'")
        serve(chosen)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def serve(chosen: argparse.Namespace) -> None:
    """Load the model, serve until Ctrl-C, and delete everything except corrections."""
    with watched(f"loading {chosen.run}"):
        from common.predict.cards import about
        from common.predict.classifier import Classifier  # imports torch, which takes seconds
        from common.predict.photos import names_of
        from common.serve.page import Page
        from common.serve.service import Limits, PredictionService

        classifier = Classifier.load(
            chosen.run,
            names_of(chosen.names),
            chosen.risk,
            trust_code=chosen.trust_code,
            data=chosen.data,
            unknown=chosen.unknown,
        )
        classifier.quieten()
    # handlers of our own, so that uploads are deleted and the model is released at the end
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with tempfile.TemporaryDirectory(prefix="uploads-") as uploads:
        service = PredictionService(classifier, chosen.feedback.expanduser(), Limits(chosen.max_mb))
        page = Page(service, about(classifier, chosen.risk), Path(uploads), is_local=chosen.host in LOCAL)
        try:
            server = page.launch(chosen.host, chosen.port)
        except OSError as error:
            raise UserError(
                f"port {chosen.port} cannot be listened on ({error}); choose another with --port"
            ) from error
        print(f"{server.local_url}  (Ctrl-C ends it)", flush=True)
        ended.wait()
        server.close()
        classifier.close()


if __name__ == "__main__":
    process.ensure_utf8()
    sys.exit(main())
