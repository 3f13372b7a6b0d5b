"""Upload of an export to the Hub: only files listed in its export.json."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from m3i_scale.errors import ExportError
from m3i_scale.files import sha256_of
from m3i_scale.text import redact

PROVENANCE = "export.json"


def listed_files(folder: Path) -> dict[str, int]:
    """Return the files of an export and their sizes, after verifying each against its hash in export.json."""
    try:
        items = _listed((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ExportError(
            f"the folder is not an export: it has no {PROVENANCE} with a list of files",
            where=str(folder),
            fix="use the folder that `m3i-scale export` wrote",
        ) from None
    for name, digest in items:
        path = _inside(folder, name)
        if not path.is_file() or sha256_of(path) != digest:
            raise ExportError(
                f"'{name}' is missing or has changed since the export was verified",
                where=str(folder),
                fix="export again, with --overwrite",
            )
    names = {PROVENANCE, *(name for name, _ in items)}
    beside = sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - names)
    if beside:
        raise ExportError(
            f"{len(beside)} files are not part of the export, e.g. '{beside[0]}'",
            where=str(folder),
            fix="move them to another folder",
        )
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def check_repository_name(repo: str) -> None:
    """Validate a value of `--push`."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ExportError(
            f"--push must be a repository name, got '{repo}': {error}",
            where=f"--push {repo}",
            fix="use --push USER/NAME",
        ) from None


def push(folder: Path, repo: str, *, public: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Publish an export as a model repository, in one commit.

    Files of an earlier export that are not part of this one (such as shards of a larger model) are removed in the same
    commit. Files that no export lists remain.

    The access token comes from `huggingface_hub` (`HF_TOKEN`, `hf auth login`). After a failure, call it again:
    uploaded files are not sent again, and no commit contains a partial model.

    Args:
        folder: the export.
        repo: `user/name`; created if it does not exist.
        public: make the repository public; default: private.
        dry_run: only list the files to upload; needs no token and no network.

    Returns:
        `repo`, `public` (actual visibility), `files` (bytes by name) and `bytes`. Except for a dry run, also `removed`
        (names) and `commit`.
    """
    check_repository_name(repo)
    files = listed_files(folder)
    facts = {"repo": repo, "public": public, "files": files, "bytes": sum(files.values())}
    if dry_run:
        return facts
    api = HfApi(library_name="m3i_scale", token=True)  # otherwise it would send an anonymous request, which fails
    try:
        api.create_repo(repo, private=not public, repo_type="model", exist_ok=True)
        # create_repo does not change an existing repository.
        there = api.model_info(repo)
        if there.private is False and not public:
            raise ExportError(
                "the repository already exists and is public",
                where=f"--push {repo}",
                fix="add --public, or use another name",
            )
        removed = sorted(_of_earlier_export(api, repo, there) - files.keys())
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files),
                *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removed),
            ],
            commit_message=f"Export of {folder.name}",
            repo_type="model",
            # `removed` was computed from this revision of the repository.
            parent_commit=there.sha if removed else None,
        )
    except LocalTokenNotFoundError:
        raise ExportError(
            "no access token", where=f"--push {repo}", fix="run `hf auth login`, or set HF_TOKEN"
        ) from None
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        raise ExportError(
            f"the upload failed: {redact(str(cause)).strip().splitlines()[0] if str(cause) else type(cause).__name__}",
            where=f"--push {repo}",
            why=f"the export in {folder} is complete",
            fix="use an access token with write permission (hf auth login, or HF_TOKEN), or another name"
            if refused
            else "run the command again with --overwrite; files that have arrived are not sent again",
        ) from None
    public = there.private is False  # the visibility of an existing repository does not change
    return facts | {"public": public, "removed": removed, "commit": str(commit.oid)}


def push_summary(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return table rows that summarize the result of `push`."""
    heading = "sent to" if "commit" in facts else "would send to"
    rows = [(heading, f"{facts['repo']}, {'public' if facts['public'] else 'private'}")]
    rows += [(name, f"{size:,} bytes") for name, size in facts["files"].items()]
    return rows + [(name, "removed there") for name in facts.get("removed", ())]


def _of_earlier_export(api: HfApi, repo: str, there: ModelInfo) -> set[str]:
    """Return the existing files listed in the repository's export.json; empty if it cannot be read."""
    present = {file.rfilename for file in there.siblings or []}
    if PROVENANCE not in present:
        return set()
    with tempfile.TemporaryDirectory() as name:
        path = api.hf_hub_download(repo, PROVENANCE, revision=there.sha, local_dir=name)
        try:
            listed = _listed(Path(path).read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError):  # an unrelated file with the same name
            return set()
    return present & {name for name, _ in listed}


def _listed(text: str) -> list[tuple[str, str]]:
    return [(str(name), str(digest)) for name, digest in json.loads(text)["files"].items()]


def _inside(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    path = folder / name
    links = [place for place in (path, *path.parents) if place != folder and folder in place.parents]
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or any(link.is_symlink() for link in links):
        raise ExportError(
            f"'{name}' must be a file in the folder of the export",
            where=str(folder / PROVENANCE),
            fix="export again, with --overwrite",
        )
    return path
