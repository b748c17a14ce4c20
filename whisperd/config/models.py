"""A declared model: where its files come from and under which names it is served."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from whisperd.errors import SourceError
from whisperd.reference import FORMS, Source, parse

Name = Annotated[str, Field(pattern=r"^[^\s\x00-\x1f\x7f]+$", max_length=200)]


class Table(BaseModel):
    """A table of whisperd.toml: every key is known, every type is exact, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelTable(Table):
    """One model. A string in whisperd.toml is the ``repo`` of a table that says nothing else."""

    repo: str = Field(description=f"Where the files come from: {FORMS}.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the repository (main).")
    name: Name | None = Field(
        default=None, description="Name that requests use (the repository's, or the directory's)."
    )
    aliases: tuple[Name, ...] = Field(default=(), description='Further names, such as ["whisper-1"].')
    preload: bool = Field(default=True, description="Load at boot; false: at the first request.")
    keep_loaded: bool = Field(
        default=False, description="Never unload it, neither when idle nor to make room for another."
    )
    _source: Source = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _read_string(cls, given: object) -> object:
        return {"repo": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _parse(self) -> ModelTable:
        try:
            self._source = parse(self.repo, self.revision)
        except SourceError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def source(self) -> Source:
        """Where the files come from, parsed."""
        return self._source

    @property
    def served_name(self) -> str:
        """The name that ``/v1/models`` lists."""
        return self.name or self.source.default_name

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that requests may use, the served one first."""
        return (self.served_name, *self.aliases)
