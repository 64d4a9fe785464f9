"""A finished dataset as a repository of a model hub, by `huggingface_hub`.

A hub changes in commits: who reads it sees the dataset that was there, or the new one. Only one of
more than COMMIT_FILES files comes in several commits, its manifest in the last.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from huggingface_hub.utils.tqdm import disable_progress_bars

from farm.blobs import BlobStore
from farm.datasets.manifest import Manifest, files_of, manifest_of
from farm.datasets.place import mark
from farm.datasets.publish import Done, fetch
from farm.datasets.stats import LOOSE, MANIFEST, OWN, File
from farm.errors import AccessDenied, FarmError, HubUnavailable, InvalidConfig

COMMIT_FILES = 1_000  # as many as huggingface_hub commits at most when it uploads large folders
TOGETHER_FILES, TOGETHER_BYTES = 32, 256 * 2**20  # sent side by side; they lie here until they are
_THREADS = 4
_WHERE = re.compile(r"hf://datasets/([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})/?", re.ASCII)


def repository(where: str) -> str:
    """`me/shapes` of `hf://datasets/me/shapes`. Raises InvalidConfig."""
    found = _WHERE.fullmatch(where)
    if found is None:
        raise InvalidConfig(f"{where!r} is no dataset of a hub: expected hf://datasets/OWNER/NAME")
    return found[1]


def publish_to_hub(
    source: BlobStore, where: str, to: str, hub_url: str, token: str, private: bool, done: Done
) -> str:
    """Copy the dataset that lies in `where` to the repository `to`; the URL of the last commit.

    What is there, to the byte, is not sent again, nor are large files that a broken off call sent.
    `token`: if empty, the one of `hf auth login`. `private`: so is a repository that is made now.
    Raises NotFound where there is no finished dataset, BlobDamaged for a file that is not what was
    written, InvalidConfig for a repository where something else lies or that somebody changes
    meanwhile, AccessDenied, and HubUnavailable.
    """
    repo, manifest = repository(to), manifest_of(source, where)
    disable_progress_bars()
    api = HfApi(endpoint=hub_url.rstrip("/"), token=token or None, library_name="renderfarm")
    with source.aside() as folder, _told(to):
        api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
        return _Upload(api, repo, source, manifest, folder, done).all()


class _Upload:
    """Of one call. Files lie in `folder` until they are sent, small ones until their commit."""

    def __init__(
        self,
        api: HfApi,
        repo: str,
        source: BlobStore,
        manifest: Manifest,
        folder: Path,
        done: Done,
    ) -> None:
        self._api, self._repo, self._source, self._manifest = api, repo, source, manifest
        self._folder, self._done, self._numbers = folder, done, count()
        self._head = str(api.repo_info(repo, repo_type="dataset").sha)
        self._url = f"{api.endpoint}/datasets/{repo}/commit/{self._head}"
        tree = api.list_repo_tree(repo, recursive=True, repo_type="dataset", revision=self._head)
        self._there = {one.path: one for one in tree if isinstance(one, RepoFile)}
        self._begun = self._is_ours()
        self._operations: list[CommitOperationAdd | CommitOperationDelete] = []

    def all(self) -> str:
        known, some, size = {MANIFEST}, [], 0
        for file in files_of(self._source, self._manifest):
            known.add(file.key)
            if self._has(file):
                self._done(file, False)
                continue
            some.append(file)
            size += file.size
            if len(some) == TOGETHER_FILES or size >= TOGETHER_BYTES:
                self._send(some)
                some, size = [], 0
        self._send(some)
        gone = [key for key in self._there if key.startswith(OWN) and key not in known]
        self._operations += [CommitOperationDelete(key, is_folder=False) for key in gone]
        written = self._source.get(MANIFEST)
        sha256 = hashlib.sha256(written).hexdigest()
        if self._operations or not self._has(File(key=MANIFEST, sha256=sha256, size=len(written))):
            self._operations.append(CommitOperationAdd(MANIFEST, written))
            self._commit(f"{self._manifest.name}: {self._manifest.rows:,} rows")
        return self._url

    def _has(self, file: File) -> bool:
        """Whether the repository has the file, to the byte."""
        there = self._there.get(file.key)
        if there is None or there.size != file.size:
            return False
        if there.lfs:
            return there.lfs.sha256 == file.sha256
        data = self._source.get(file.key)  # small: the hub keeps it in git itself
        same = git_hash(data) == there.blob_id
        return same and hashlib.sha256(data).hexdigest() == file.sha256

    def _send(self, files: list[File]) -> None:
        additions = []
        for file in files:
            path = self._folder / str(next(self._numbers))
            fetch(self._source, file, path)
            addition = CommitOperationAdd(file.key, path)
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)
            additions.append((addition, path))
        these = [addition for addition, _ in additions]
        self._api.preupload_lfs_files(self._repo, these, repo_type="dataset", num_threads=_THREADS)
        for file, (addition, path) in zip(files, additions, strict=True):
            if addition.path_or_fileobj == b"":  # large, and sent
                path.unlink()
            self._done(file, True)
        self._operations += these
        if len(self._operations) >= COMMIT_FILES:
            if not self._begun:  # so that a later call knows it for its own
                self._operations.append(CommitOperationAdd(MANIFEST, mark(self._manifest.name)))
                self._begun = True
            self._commit(f"{self._manifest.name}: a part")

    def _commit(self, message: str) -> None:
        made = self._api.create_commit(
            self._repo,
            self._operations,
            commit_message=message,
            repo_type="dataset",
            parent_commit=self._head,
            num_threads=_THREADS,
        )
        self._head, self._url = made.oid, made.commit_url
        for one in self._operations:
            if isinstance(one, CommitOperationAdd) and isinstance(one.path_or_fileobj, str):
                Path(one.path_or_fileobj).unlink()
        self._operations.clear()

    def _is_ours(self) -> bool:
        """Whether this dataset lies there, if only a part. Raises InvalidConfig for another one."""
        name = self._manifest.name
        if MANIFEST not in self._there:
            taken = (key for key in self._there if key in LOOSE or key.startswith(OWN))
            if key := next(taken, None):
                raise InvalidConfig(
                    f"{key} lies in the repository {self._repo}, and no {MANIFEST} that says whose "
                    f"it is; give {name!r} an empty repository, or remove what is there"
                )
            return False
        found = self._api.hf_hub_download(
            self._repo, MANIFEST, repo_type="dataset", revision=self._head, local_dir=self._folder
        )
        told = None
        with suppress(ValueError, RecursionError, AttributeError):
            told = json.loads(Path(found).read_bytes()).get("name")
        if told != name:
            raise InvalidConfig(
                f"a dataset named {str(told)[:60]!r} lies in the repository {self._repo}; give "
                f"{name!r} one of its own"
            )
        return True


@contextmanager
def _told(to: str) -> Iterator[None]:
    """Raises what `huggingface_hub` raises as the farm's; its texts may hold signed URLs."""
    try:
        yield
    except (
        httpx2.HTTPError,
        EntryNotFoundError,
        ConnectionError,
        RuntimeError,
        ValueError,
    ) as error:
        raise _fault(to, error) from None


def _fault(to: str, error: BaseException) -> FarmError:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is None:
        last = error.__cause__ or error
        text = f"{type(last).__name__}: " + re.sub(r"\?\S+", "?...", str(last))[:300]
        if isinstance(error, ValueError):
            return InvalidConfig(f"{to}: the hub does not take it ({text})")
        return HubUnavailable(f"{to}: {text}; publish it again to go on")
    status, reason = cause.response.status_code, cause.server_message or ""
    told = f"{status}: {reason[:300]}" if reason else str(status)
    if status in (401, 403):
        return AccessDenied(f"{to}: refused ({told}); HF_TOKEN must be one that may write there")
    if status in (409, 412):
        return InvalidConfig(f"{to}: somebody else changed it meanwhile ({told}); publish it again")
    if status < 500 and status not in (408, 429):
        return InvalidConfig(f"{to}: the hub does not take it ({told})")
    return HubUnavailable(f"{to}: the hub does not answer ({told}); publish it again to go on")
