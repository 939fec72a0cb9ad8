"""An exported folder on the Hugging Face hub. Nothing is sent without being asked twice."""

from __future__ import annotations

from pathlib import Path

from common.counted import counted
from common.models.files import check_links
from common.types import UserError


def check_name(name: str) -> None:
    """
    Raises:
        UserError: The name is no id of the hub.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"--push {name}: give the id of a model on the hub, owner/name")


def check_card(folder: Path, run: Path) -> None:
    """Whether a folder holds what was exported from a run.

    Raises:
        UserError: It holds something else.
    """
    from common.predict.trained import Trained  # torch
    from common.run.result import Result

    signature = Result.load(Trained.of(run).records).signature
    if f"| configuration | {signature} |" not in (folder / "README.md").read_text(encoding="utf-8"):
        raise UserError(f"{folder} holds something else than an export of {run}; give a new folder")


def plan(folder: Path, name: str) -> str:
    """What would be sent, a line per file, for a dry run.

    Raises:
        UserError: A link leads out of the folder.
    """
    check_links(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"  {path.stat().st_size / 1e6:10.3f} MB  {path.relative_to(folder).as_posix()}" for path in files]
    total = sum(path.stat().st_size for path in files) / 1e6
    return "\n".join([f"to https://huggingface.co/{name}, {counted(len(files), 'file')}, {total:.1f} MB:", *lines])


def push(folder: Path, name: str, private: bool) -> str:
    """Send a folder; the account is the one of `hf auth login`. Returns the commit's address.

    Raises:
        UserError: The hub cannot be reached or refuses.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise UserError(f"--push {name}: it is there already and public; give another name, or --public")
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported"))
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"--push {name}: {' '.join(str(error).split())}; hf auth login gives this machine an account"
        ) from error
