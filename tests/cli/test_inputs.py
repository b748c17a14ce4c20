"""The files and names that the arguments of a command stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.service_fake import TRANSCRIPT
from whisperd.cli.inputs import STDIN, expand
from whisperd.cli.outputs import Output
from whisperd.cli.transcribe import common_code, plan_output
from whisperd.errors import UsageError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Recordings in two levels of directories, and a file that is not a recording."""
    for name in ("b.mp3", "a.WAV", "notes.txt", ".hidden.mp3", "sub/a.wav", "sub/deep/c.mkv", ".git/d.wav", "sub/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / ".git/empty").mkdir()
    return tmp_path


def names(*given: Path) -> dict[str, str]:
    return {path.name: str(name) for path, name in expand(given).items()}


def test_directories(tree: Path) -> None:
    """A directory is expanded to all recordings below it, in order, and their structure is kept."""
    found = expand([tree])
    assert [str(path.relative_to(tree)) for path in found] == ["a.WAV", "b.mp3", "sub/a.wav", "sub/deep/c.mkv"]
    assert [str(name) for name in found.values()] == ["a", "b", "sub/a", "sub/deep/c"]
    with pytest.raises(UsageError, match="no recordings in"):
        expand([tree / ".git" / "empty"])


def test_patterns(tree: Path) -> None:
    """A pattern that the shell did not expand is expanded; one that matches nothing is a file that does not exist."""
    assert list(names(tree / "*.mp3")) == [".hidden.mp3", "b.mp3"]
    assert list(names(tree / "**" / "*.wav")) == ["d.wav", "a.wav"]
    assert list(names(tree / "*.ogg")) == ["*.ogg"]
    (tree / "[x].mp3").touch()
    assert names(tree / "[x].mp3") == {"[x].mp3": "[x]"}


def test_each_file_once(tree: Path) -> None:
    """A file that is named twice is transcribed once."""
    assert len(expand([tree / "b.mp3", tree / "b.mp3", tree])) == 4


def test_results_never_share_a_name(tree: Path) -> None:
    """Results get the input's suffix where only that differs; where this does not help, nothing is started."""
    (tree / "b.wav").touch()
    assert names(tree / "b.mp3", tree / "b.wav") == {"b.mp3": "b.mp3", "b.wav": "b.wav"}
    with pytest.raises(UsageError, match=r"two inputs are called a\.wav"):
        expand([tree / "sub/a.wav", tree / ".." / tree.name / ".git/../sub/deep/../../sub/a.wav", STDIN])
    with pytest.raises(UsageError, match="only once"):
        plan_output([STDIN, STDIN], [], None)


def test_done_is_whole(tmp_path: Path) -> None:
    """A recording is done when all its files exist; a partly written file never has the final name."""
    output = Output(formats=("txt", "srt"), directory=tmp_path / "out", names={Path("x/a.v1.mp3"): Path("x/a.v1")})
    (path,) = output.names
    assert not output.is_done(path)
    written = output.write(path, TRANSCRIPT)
    assert [str(target.relative_to(tmp_path)) for target in written] == ["out/x/a.v1.txt", "out/x/a.v1.srt"]
    assert output.is_done(path)
    assert {found.name for found in (tmp_path / "out/x").iterdir()} == {"a.v1.txt", "a.v1.srt"}
    written[1].unlink()
    assert not output.is_done(path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Output(formats=("txt",), directory=tmp_path / "file", names=output.names).write(path, TRANSCRIPT)


def test_common_code() -> None:
    """0 for nothing to do and for success, the common code of failures, else 1."""
    assert [common_code(codes) for codes in ([], [0, 0], [65, 65], [0, 65], [65, 66])] == [0, 0, 65, 1, 1]
