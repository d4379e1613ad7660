"""
Uploads the folder of a trained pipeline to the Hub. After a failure the same command goes on where it stopped.

    python -m flowmo_diffusers.hub.upload my_flowmo anna/my-flowmo
"""

import argparse
import glob
import json
import logging
import re
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from huggingface_hub import HfApi, RepoUrl, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id


logger = logging.getLogger(__name__)

T = TypeVar("T")

PROGRAM = "python -m flowmo_diffusers.hub.upload"

# Answers of the Hub that trying again does not change.
REFUSALS = {400, 401, 402, 403, 404, 413, 422}


def check_push(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """
    Finds out before training whether [`push_folder`] will be let in after it. The repository is created where there is
    none: nothing less tells whether the token may.

    Args:
        repo_id: "user/name" or "organisation/name"; "name" alone is the token's user's.
        private: Whether a new repository is private; `None` leaves it to the organisation's default. With `True` one
            that is there must be private already.
        token: A token that may write; default: `HF_TOKEN`, or the one that `hf auth login` stored.

    Returns:
        The full id, "user/name".

    Raises:
        ValueError: If the repository's id is malformed.
        OSError: If there is no token, the Hub refuses it, or the Hub cannot be reached.
    """
    _check_locally(repo_id, token)
    api = HfApi(token=token)

    def ask() -> str:
        full_id = _open_repo(api, repo_id, private).repo_id
        api.auth_check(full_id, write=True)
        return full_id

    try:
        return _persistently(ask, waits=(1, 5))
    except Exception as error:
        raise OSError(
            f"the Hub ({api.endpoint}) would not take the model as repo_id (--hub_model_id) {repo_id!r} with this "
            f"token (--hub_token, HF_TOKEN or `hf auth login`; it needs the right to write): {error}"
        ) from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload FlowMo pipeline",
    waits: Sequence[float] = (5, 30, 120),
) -> str:
    """
    Uploads what [`published_patterns`] names. What an earlier call has brought to the Hub, though it failed later, is
    not sent again; files of the repository that the folder does not have stay.

    Args:
        folder: A saved pipeline.
        repo_id: As in [`check_push`]; the repository is created where there is none.
        private: As in [`check_push`].
        token: As in [`check_push`].
        commit_message: Of the upload.
        waits: Seconds between attempts while the Hub cannot be reached or is in trouble; one attempt more than waits.

    Returns:
        The address of the repository.

    Raises:
        ValueError: If the repository's id is malformed.
        OSError: If `folder` is no saved pipeline, there is no token, the Hub refuses the upload or the last attempt
            failed; the message has the command that uploads again.
    """
    folder = Path(folder)
    patterns = published_patterns(folder)
    _check_locally(repo_id, token)
    api = HfApi(token=token)

    def upload() -> str:
        repo = _open_repo(api, repo_id, private)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=patterns,
            ignore_patterns=["*.partial-*"],
            commit_message=commit_message,
        )
        return str(repo)

    try:
        return _persistently(upload, waits)
    except Exception as error:
        words = [str(folder), repo_id, *(["--private"] if private else [])]
        raise OSError(
            f"the upload to {repo_id} on {api.endpoint} failed: {error}\n"
            f"Nothing is lost: {folder} is complete. This uploads what is missing (with the token in HF_TOKEN or from "
            f"`hf auth login`):\n    {PROGRAM} {shlex.join(words)}"
        ) from error


def published_patterns(folder: str | Path) -> list[str]:
    """
    What of a folder is published, as patterns: what `from_pretrained` loads (code, where the pipeline carries it), the
    card, the pictures that the card shows, `metrics.json` and a licence. Not checkpoints, and not logs, which hold
    names of machines and files.

    Raises:
        OSError: If `folder` is no saved pipeline.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise OSError(f"folder {folder} is no saved pipeline: it has no model_index.json")
    index = json.loads((folder / "model_index.json").read_text())
    components = [f"{glob.escape(name)}/*" for name in index if not name.startswith("_")]
    kind = index.get("_class_name")
    code = [f"{glob.escape(kind[0])}.py"] if isinstance(kind, list) else []
    card = folder / "README.md"
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.read_text()) if card.is_file() else []
    pictures = [glob.escape(unquote(link)) for link in links]
    return ["model_index.json", *code, *components, "README.md", *pictures, "metrics.json", "LICENSE*"]


def _open_repo(api: HfApi, repo_id: str, private: bool | None) -> RepoUrl:
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo.repo_id).private:
        raise ValueError(f"{repo} exists and is public: make it private there, or do not ask for it to be private")
    return repo


def _check_locally(repo_id: str, token: str | None) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id (--hub_model_id) {repo_id!r} must be 'name' or 'user/name': {error}") from error
    if is_offline_mode():
        raise OSError("pushing to the Hub needs it, but HF_HUB_OFFLINE=1 turns it off")
    if token is None and get_token() is None:
        raise OSError("pushing to the Hub needs a token: --hub_token, HF_TOKEN or `hf auth login`")


def _persistently(call: Callable[[], T], waits: Sequence[float]) -> T:
    """What `call` returns, called again after each wait while what it raises may pass."""
    for wait in waits:
        try:
            return call()
        except Exception as error:
            if _is_refusal(error):
                raise
            logger.warning(f"{error}\nTrying again in {wait:g} seconds.")
            time.sleep(wait)
    return call()


def _is_refusal(error: BaseException) -> bool:
    """Whether it is, or was caused by, an answer of the Hub that will not change; or was found on this side of it."""
    cause = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in REFUSALS
        cause = cause.__cause__
    return isinstance(error, ValueError)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the output folder of a training run")
    parser.add_argument("repo_id", help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="if the repository is created")
    parser.add_argument("--token", help="default: HF_TOKEN, or the one that `hf auth login` stored")
    parser.add_argument("--commit_message", default="Upload FlowMo pipeline")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        url = push_folder(args.folder, args.repo_id, args.private, args.token, args.commit_message)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"uploaded to {url}")


if __name__ == "__main__":
    main()
