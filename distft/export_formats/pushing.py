"""An exported folder goes to the hub: private unless it is said otherwise, resumable, with a commit message."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from distft.core.errors import DistftError, MachineError, Problem, RecipeError

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def refuse_bad_name(repo: str) -> None:
    """Refuse what cannot be the name of a repository, before anything is exported.

    Raises:
        RecipeError: it is not owner/name.
    """
    if not _NAME.fullmatch(repo):
        problem = Problem(message=f"--push {repo}  is no name of a repository", fix="owner/name")
        raise RecipeError("distft export", [problem])


def push(folder: Path, repo: str, *, message: str, public: bool) -> str:
    """Upload a folder and return where it is; files that are there already are not sent again.

    Args:
        folder: an exported folder.
        repo: owner/name; made where it is not there.
        message: of the commit.
        public: whether everybody may read it. A repository that is there keeps what it is.

    Raises:
        RecipeError: the repository is public, and `public` was not asked for.
        MachineError: the hub cannot be reached, or refused; the folder is whole, and the same command goes on.
    """
    library: Any = importlib.import_module("huggingface_hub")
    api = library.HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        is_private = bool(api.model_info(repo).private)
        if not is_private and not public:
            problem = f"--push {repo}: the repository is public, and everybody would read the model"
            raise RecipeError(
                "distft export", [Problem(message=problem, fix="another name, or --public if that is meant")]
            )
        made = api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=message)
    except DistftError:
        raise
    except Exception as error:  # the hub library raises its own, those of its HTTP client and of the uploader
        raise MachineError(f"{folder} is whole, and was not pushed to {repo}: {_why(error)}") from error
    return str(made.commit_url)


def _why(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub does not let this user write there ({status})  fix: hf auth login, or another owner"
    if "offline" in first.lower() or "OfflineMode" in type(error).__name__:
        return "HF_HUB_OFFLINE says to ask no hub  fix: unset it, and run the same command again: it goes on"
    if isinstance(error, ValueError | TypeError):
        return f"huggingface_hub refused it: {first}"
    if status is None:
        return (
            f"the hub cannot be reached ({type(error).__name__}: {first})  fix: run the same command again where there "
            "is a network: it goes on"
        )
    return f"the hub answered {status}: {first}  fix: run the same command again: it goes on where it was"
