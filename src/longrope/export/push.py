"""Upload of an export to the Hugging Face hub, on request only.

A new or empty repository is filled; it is made private, which its owner can change. A repository that has files gets a
pull request, so nothing is overwritten. Who uploads is decided by huggingface_hub's own token (`hf auth login`, or
HF_TOKEN), which this package never sees.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError

from longrope.errors import LongRopeError, one_line

_OWN = (".gitattributes",)
"""The files with which the hub itself begins a repository."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A repository on the hub that may be written to."""

    name: str
    """owner/name"""
    is_new: bool
    """It is not there yet."""
    pull_request: bool
    """It has files: the upload is a pull request."""


def find_destination(name: str, *, config_only: bool = False) -> Destination:
    """The repository `name`, looked at before any work; nothing is changed there.

    Raises LongRopeError: `invalid-setting` for what is no owner/name, `no-token` where huggingface_hub has no token or
    the hub refuses it, `no-such-repository` for a `config_only` export to a repository that has no files, and
    `hub-fault` where the hub cannot be asked.
    """
    if name.count("/") != 1:
        raise LongRopeError(f"expected owner/name for `push`, found {name!r}", code="invalid-setting")
    api = HfApi()
    with _as_errors(f"cannot push to {name}"):
        api.whoami()
        try:
            files, is_new = [file for file in api.list_repo_files(name) if file not in _OWN], False
        except RepositoryNotFoundError:
            files, is_new = [], True
    if config_only and not files:
        raise LongRopeError(
            f"`config_only` goes to the repository that has the weights; there are no files in {name}",
            code="no-such-repository",
            hint="give that repository, or leave out `config_only`",
        )
    return Destination(name, is_new, bool(files))


def push(path: Path, destination: Destination, message: str) -> str:
    """Upload the folder or file `path` as one commit with `message`; returns the address of the commit or pull request.

    Raises LongRopeError as `find_destination` does; `path` is as it was.
    """
    api, name = HfApi(), destination.name
    with _as_errors(
        f"{path} is whole, but was not pushed to {name}",
        f"hf upload {name} {shlex.quote(str(path))}{'' if path.is_dir() else f' {shlex.quote(path.name)}'}",
    ):
        if destination.is_new:
            api.create_repo(name, private=True)
        if path.is_dir():
            done = api.upload_folder(
                repo_id=name,
                folder_path=path,
                commit_message=message,
                create_pr=destination.pull_request,
                ignore_patterns=[".*"],
            )
        else:
            done = api.upload_file(
                repo_id=name,
                path_or_fileobj=path,
                path_in_repo=path.name,
                commit_message=message,
                create_pr=destination.pull_request,
            )
    return str(done.pr_url or done.commit_url)


@contextmanager
def _as_errors(what: str, command: str = "") -> Iterator[None]:
    """Faults of the hub and its client as one line, with the `command` that tries again."""
    again = f"; to try again: {command}" if command else ""
    try:
        yield
    except HFValidationError as error:
        raise LongRopeError(f"{what}: {one_line(error)}", code="invalid-setting") from error
    except LocalTokenNotFoundError as error:
        raise LongRopeError(
            f"{what}: huggingface_hub has no token here",
            code="no-token",
            hint=f"log in with hf auth login, or set HF_TOKEN{again}",
        ) from error
    except Exception as error:  # the hub's client raises many kinds of error
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        raise LongRopeError(
            f"{what}: {one_line(error)}",
            code="no-token" if refused else "hub-fault",
            hint=f"a token that may write there is needed: hf auth login{again}"
            if refused
            else again.removeprefix("; "),
        ) from error
