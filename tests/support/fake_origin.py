"""A Hub without a network."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.loopback_hub import HubRepo, whisper_files
from whisperd.errors import HubUnreachable
from whisperd.reference import HubSource
from whisperd.store.hub import FetchJob
from whisperd.store.plan import RemoteFile, Resolved, select_files

REPOS = ("org/a", "org/b")


class FakeOrigin:
    """An origin of files in memory; files may be cut off, wrong or missing."""

    def __init__(self) -> None:
        self.repos = {name: HubRepo(id=name) for name in REPOS}
        self.fault: Callable[[bytes], bytes] | None = None
        self.is_down = False

    def commit(self, name: str, branch: str, seed: int) -> None:
        files = whisper_files(seed, size_bytes=100)
        # one file is the same in all commits of all repositories, as tokenizers often are
        self.repos[name].commit(files | {"tokenizer.json": b"{}"}, branch=branch)

    def resolve(self, source: HubSource) -> Resolved:
        commit = self.repos[source.repo_id].resolve(source.revision)
        if self.is_down or commit is None:
            raise HubUnreachable("down")
        return Resolved(
            commit=commit, files=select_files(self.files(source.repo_id, commit), self._reader(source.repo_id, commit))
        )

    def fetch(self, job: FetchJob, on_bytes: Callable[[int], None]) -> None:
        if self.is_down:
            raise HubUnreachable("down")
        tree = self.repos[job.repo].commits[job.commit]
        for file in job.files:
            data = tree[file.path].data
            (job.directory / file.hash).write_bytes(self.fault(data) if self.fault else data)
            on_bytes(job.size_bytes)

    def _reader(self, name: str, commit: str) -> Callable[[str, int], bytes]:
        return lambda path, n_bytes: self.repos[name].commits[commit][path].data[:n_bytes]

    def files(self, name: str, commit: str) -> list[RemoteFile]:
        return [
            RemoteFile(path=file.path, size_bytes=len(file.data), hash=file.sha256 if file.is_lfs else file.oid)
            for file in self.repos[name].commits[commit].values()
        ]
