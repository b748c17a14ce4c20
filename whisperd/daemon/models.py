"""The declared models as they are served: one entry for each, and each loading of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from whisperd.config import ModelTable
from whisperd.errors import Error, ModelLoading, ModelNotFound
from whisperd.transcription.model import LoadedModel

# names that OpenAI's clients send by default or by habit; they mean the default model unless one is declared under them
OPENAI_NAMES = frozenset(
    {"whisper-1", "gpt-transcribe", "gpt-4o-transcribe", "gpt-4o-mini-transcribe", "gpt-4o-mini-transcribe-2025-12-15"}
)


@dataclass(slots=True, kw_only=True, eq=False)
class ModelInstance:
    """One loading of a model from a snapshot. Its use is changed by ``Leases`` only, under their lock.

    ``state``: new requests get it while it is ``serving``; it is ``leaving`` while requests still hold it, and
    ``closing`` until its engine is closed. ``used_at_s`` is when a request last took or left it.
    """

    model: LoadedModel
    snapshot: Path
    state: Literal["serving", "leaving", "closing", "closed"] = "serving"
    n_holders: int = 0
    used_at_s: float = 0.0

    @property
    def failed(self) -> bool:
        """True after its batcher stopped; it serves no more request."""
        return self.model.batcher.failure is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailure:
    """The last attempt to load a model failed: when, on the monotonic clock, and why."""

    at_s: float
    error: Error


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A declared model.

    ``snapshot``: its files; None while the cache does not have them. ``instance``: None while it is not in memory.
    """

    table: ModelTable
    snapshot: Path | None = None
    instance: ModelInstance | None = None
    failure: LoadFailure | None = None

    @property
    def name(self) -> str:
        """The name under which it is served."""
        return self.table.served_name

    @property
    def revision(self) -> str | None:
        """The commit of a snapshot in a Hugging Face cache."""
        found = self.snapshot
        return found.name if found is not None and found.parent.name == "snapshots" else None


@dataclass(frozen=True, slots=True)
class ServedModels:
    """All declared models, the default one first. Empty before the first load."""

    models: tuple[ServedModel, ...] = ()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self.models)

    @property
    def loaded(self) -> Mapping[str, LoadedModel]:
        """The models in memory, by name."""
        return {one.name: one.instance.model for one in self.models if one.instance is not None}

    @property
    def snapshots(self) -> Mapping[str, Path]:
        """The files of those that are in the cache, by name."""
        return {one.name: one.snapshot for one in self.models if one.snapshot is not None}

    @property
    def memory_bytes(self) -> int:
        """What the models in memory are counted as."""
        return sum(model.memory_bytes for model in self.loaded.values())

    def find(self, name: str) -> ServedModel | None:
        """The model with this declared name."""
        return next((one for one in self.models if one.name == name), None)

    def resolve(self, name: str | None) -> str:
        """The declared name that a request means; raises ModelLoading or ModelNotFound."""
        if not self.models:
            raise ModelLoading("no model is loaded yet", retry_after_s=2.0)
        default = self.models[0].name
        known = {one.name: one.name for one in self.models}
        known |= {alias: one.name for one in self.models for alias in one.table.aliases}
        if not name or (name in OPENAI_NAMES and name not in known):
            return default
        if name not in known:
            raise ModelNotFound(f"no model {name!r} is served here; this daemon has: {', '.join(known)}", param="model")
        return known[name]

    def changed(self, name: str, **changes: Any) -> ServedModels:
        """The same models with other values in the entry of one of them."""
        return ServedModels(tuple(replace(one, **changes) if one.name == name else one for one in self.models))

    def with_instances(self, instances: Mapping[str, ModelInstance]) -> ServedModels:
        """The same models, in memory where ``instances`` has one for their name."""
        return ServedModels(tuple(replace(one, instance=instances.get(one.name)) for one in self.models))
