"""The grammar of model references: what is valid, what is refused, and that no two repositories share a folder."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import assume, given
from hypothesis import strategies as st

from whisperd.errors import SourceError
from whisperd.reference import HubSource, PackageSource, PathSource, Source, parse
from whisperd.store.cache import folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"

REPO_TEXT = st.text("ab.-_/0", max_size=12) | st.from_regex(r"[ab][ab._-]{0,6}/[ab._-]{0,6}[ab]", fullmatch=True)
SOURCES: st.SearchStrategy[Source] = st.one_of(
    st.builds(
        HubSource,
        repo_id=st.from_regex(r"[a-z]{1,4}([._-][a-z]{1,3})?/[A-Z]{1,4}(-[0-9]{1,2})?", fullmatch=True),
        revision=st.sampled_from(["main", "v1", "refs/pr/7", COMMIT]),
    ),
    st.builds(lambda parts: PathSource(path=Path("/", *parts)), st.lists(st.text("ab @-", min_size=1), min_size=1)),
    st.builds(
        PackageSource,
        module=st.from_regex(r"[a-z]{1,4}(\.[a-z]{1,4})?", fullmatch=True),
        subdir=st.sampled_from(["", "model", "models/tiny"]),
    ),
)


def parsed(text: str) -> Source | None:
    try:
        return parse(text)
    except SourceError:
        return None


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("openai/whisper-tiny", HubSource(repo_id="openai/whisper-tiny")),
        ("openai/whisper-tiny@refs/pr/1", HubSource(repo_id="openai/whisper-tiny", revision="refs/pr/1")),
        (f"a/b@{COMMIT.upper()}", HubSource(repo_id="a/b", revision=COMMIT)),
        ("path:/srv//model/", PathSource(path=Path("/srv/model"))),
        ("path:/srv/a@b", PathSource(path=Path("/srv/a@b"))),
        ("package:some.module/sub/dir", PackageSource(module="some.module", subdir="sub/dir")),
        ("package:some.module", PackageSource(module="some.module", subdir="")),
    ],
)
def test_the_three_forms(reference: str, expected: Source) -> None:
    """All three forms are parsed; a commit in capitals is still a commit."""
    assert parse(reference) == expected


@pytest.mark.parametrize(
    "reference",
    [
        "", "tiny", "a/b/c", "a/b--c", "a--b/c", "a-/b", "-a/b", "a/b.", "a/.b", "a/b..c", "a/b.git", "/srv/model",
        f"a/{'b' * 97}", "a/b\n", "é/b",
        "a/b@", "a/b@@", "a/b@../x", "a/b@x y", "a/b@.x", "a/b@x/.y", "a/b@x.lock", "a/b@x/", "a/b@x@{1}",
        f"a/b@{'x' * 256}", "a/b@x\0",
        "path:", "path:/", "path:relative", "path:/a\0b",
        "package:", "package:a/../b", "package:a//b", "package:a/b\0",
    ],
)  # fmt: skip
def test_everything_else_is_refused(reference: str) -> None:
    """An invalid reference is refused with a list of the valid forms."""
    with pytest.raises(SourceError, match="expects"):
        parse(reference)


@given(REPO_TEXT)
def test_a_repository_is_what_the_hub_takes_for_one(text: str) -> None:
    """Each accepted repository is one for huggingface_hub; of owner/name each one of the Hub is accepted."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        assert parsed(text) is None
    else:
        assume("/" in text)
        assert isinstance(parsed(text), HubSource)


def test_no_two_repositories_share_a_folder() -> None:
    """Of all texts of a, - and / up to nine characters, the valid repositories have folders of their own."""
    texts = ("".join(characters) for length in range(3, 10) for characters in product("a-/", repeat=length))
    found = {source.repo_id for text in texts if isinstance(source := parsed(text), HubSource)}
    assert len(found) > 100
    assert len({folder(repo_id) for repo_id in found}) == len(found)


@given(SOURCES)
def test_a_source_reads_back(source: Source) -> None:
    """The text of a source, and its shortest text, parse to the same source."""
    assert parse(str(source)) == source
    assert parse(source.shortest) == source


@given(st.text(max_size=30))
def test_nothing_else_is_raised(text: str) -> None:
    """Any text is a source whose text parses back, or a SourceError."""
    if (source := parsed(text)) is not None:
        assert parse(str(source)) == source
