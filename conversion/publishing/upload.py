"""The upload of a checkpoint as one commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from ..errors import CheckpointError
from ..files.weights import SAFETENSORS
from .card import card_of
from .folder import README, Checkpoint, examine


@dataclass(frozen=True)
class PushFile:
    """A file to upload: where it will be in the repository, and its size in bytes."""

    path: str
    size: int


def files_to_push(folder: Path, repo_id: str | None = None) -> list[PushFile]:
    """List what `push` would upload, sorted by path, without asking the Hub.

    Backups, hidden and temporary files are left out, and so is whatever no model repository needs.

    Args:
        folder: a checkpoint with `config.json` and safetensors.
        repo_id: with it, README.md is listed as it would be uploaded, even where the folder has none.

    Raises:
        CheckpointError: the folder can't be published as it is.
    """
    checkpoint = examine(folder)
    sizes = {path: (folder / path).stat().st_size for path in checkpoint.paths}
    if repo_id is not None:
        sizes[README] = len(card_of(checkpoint, repo_id).encode())
    return [PushFile(path, size) for path, size in sorted(sizes.items())]


_MESSAGE = "Upload model, tokenizer, code and card"


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a checkpoint as one commit; the folder stays as it is. Run again after an interruption, it resumes.

    Large files are sent one by one before the commit refers to them: the Hub knows a file that has arrived by its hash,
    commit or not, and doesn't ask for it again. Given all files at once, huggingface_hub would hash them all before the
    first byte is sent (LFS) or register them only together (Xet), so an interruption would cost more. The commit comes
    last and is a single one, so that nobody ever downloads half a checkpoint.

    Args:
        repo_id: "organisation/name", or "name" for a repository of the user's own; it is created where it is missing.
        private: create it as a private one.
        revision: branch, created from main where it is missing; main unless given.
        token: in place of that of `hf auth login`.
        message: of the commit.

    Returns:
        URL of the commit; of the latest one if nothing has changed.

    Raises:
        CheckpointError: the folder can't be published as it is, the Hub refuses, or it can't be reached.
    """
    checkpoint = examine(folder)
    card_of(checkpoint, repo_id)  # what it refuses is refused before anything is created
    api = HfApi(token=token or True)  # True: without a token, fail before anything is sent
    with _explained(repo_id):
        repo_id = _make_repository(api, repo_id, private, revision)
        _refuse_shadow(api, checkpoint, repo_id, revision)
        additions = [CommitOperationAdd(path, folder / path) for path in checkpoint.paths if path != README]
        additions.append(CommitOperationAdd(README, card_of(checkpoint, repo_id).encode()))
        for addition in additions:
            api.preupload_lfs_files(repo_id, [addition], revision=revision, free_memory=False)
        return api.create_commit(repo_id, additions, commit_message=message or _MESSAGE, revision=revision).commit_url


def _make_repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> str:
    """Full name of a repository that is there, with its branch, when this returns."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise CheckpointError(f"{repo_id} exists and is public: make it private there, or choose another name.")
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _refuse_shadow(api: HfApi, checkpoint: Checkpoint, repo_id: str, revision: str | None) -> None:
    if SAFETENSORS not in checkpoint.paths and api.file_exists(repo_id, SAFETENSORS, revision=revision):
        where = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repo_id} holds {SAFETENSORS}, which would be loaded in place of these {len(checkpoint.weights.files)} "
            f"files: remove it with `hf repos delete-files {repo_id} {SAFETENSORS}{where}`."
        )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors that say what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except LocalTokenNotFoundError as error:
        raise CheckpointError(f"{repo_id} needs a token: log in with `hf auth login`, or pass one.") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(_explain(error, repo_id)) from error


def _explain(error: Exception, repo_id: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = " ".join(f"{error} {error.__cause__ if isinstance(error, RuntimeError) else ''}".split())
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            f"The Hub doesn't know this token, or hides {repo_id} from it: log in with `hf auth login`, or pass "
            f"another token. {reason}"
        )
    if status == 403:
        return (
            f"This token may not write to {repo_id}: log in with `hf auth login` and a token that may, or choose a "
            f"repository of your own. {reason}"
        )
    if _is_final(error, status):
        return f"The Hub refuses the upload to {repo_id}: mend what it names. {reason}"
    return f"The upload to {repo_id} stopped; run it again to resume. {reason}"


def _is_final(error: Exception, status: int | None) -> bool:
    """Whether the same request would fail again."""
    if status is not None:
        return 400 <= status < 500 and status not in (408, 409, 412, 429)
    return isinstance(error, ValueError) and not isinstance(error, JSONDecodeError)  # which proxies cause
