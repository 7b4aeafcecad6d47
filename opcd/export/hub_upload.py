"""Upload of a student's folder to the Hugging Face hub. The token is read from the environment (HF_TOKEN) only."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]  # httpx's

from opcd.export.source import Source
from opcd.models.hub_access import hub_reachable
from opcd.models.model_card import is_hub_id
from opcd.runtime.errors import UserError

TOKEN = "HF_TOKEN"
REPO = re.compile(r"[\w.-]+/[\w.-]+")
OWN = {".gitattributes", "README.md"}
"""Files that the hub itself puts into a new repository."""


def check_hub(source: Source, repo: str, private: bool) -> None:
    """Check, before weights are loaded, that the student can be uploaded.

    Raises:
        UserError: no token, a wrong name, a repository that has files or another visibility, an adapter whose base is a
            local folder, or a hub that cannot be reached or rejects the token.
    """
    if REPO.fullmatch(repo) is None:
        raise UserError(f"--repo must be ORG/NAME, not {repo!r}")
    if source.adapted and not is_hub_id(source.base):
        raise UserError(
            f"--to hub: the adapter's base is a folder of this machine ({source.base}), which nobody else can load; "
            "export --to merged, and then the folder that this writes --to hub"
        )
    if not os.environ.get(TOKEN):
        raise UserError(f"--to hub: set {TOKEN} in the environment to a token that may write to {repo}")
    if not hub_reachable():
        raise UserError(f"--to hub: the hub {constants.ENDPOINT} cannot be reached")
    api = HfApi(token=os.environ[TOKEN])
    try:
        api.whoami()
        there = api.model_info(repo)
    except RepositoryNotFoundError:
        return
    except HTTPError as error:
        raise _refused(repo, error) from error
    if files := sorted({file.rfilename for file in there.siblings or []} - OWN):
        raise UserError(f"--repo: {repo} already has files ({', '.join(files[:3])}); choose another name")
    if bool(there.private) != private:
        found, remedy = ("private", "add --private") if there.private else ("public", "choose another name")
        raise UserError(f"--repo: {repo} exists and is {found}; {remedy}")


def push(folder: Path, repo: str, private: bool) -> str:
    """Create the repository if there is none, upload a folder as one commit, and return the commit's address.

    Raises:
        UserError: the hub cannot be reached or rejects the upload.
    """
    api = HfApi(token=os.environ[TOKEN])
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A student of opcd")
    except HTTPError as error:
        raise _refused(repo, error) from error
    return str(commit.commit_url)


def _refused(repo: str, error: Exception) -> UserError:
    why = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(f"--to hub: {constants.ENDPOINT} rejects {repo}, or cannot be reached: {why}")
