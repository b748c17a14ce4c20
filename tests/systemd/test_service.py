"""The service under a real systemd: start, status, reload, restart, failures, socket, sandbox, journal."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.speech import Clip, plain
from tests.systemd.machine import SOCKET, UNIT
from tests.systemd.service import CLIENTS, MODEL, PATIENCE_S, Service
from whisperd.errors import RemoteError

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(2400)]

BURST = 50
TOKEN = "hf_ofthistestalone"


def test_start(service: Service, clips: dict[str, Clip]) -> None:
    """start returns when the service serves; the status line has the model, the device and the queue."""
    assert service.systemctl("restart") == 0
    assert service.machine.show("ActiveState") == "active"
    assert service.status_text.startswith("serving tiny (cpu, int8")
    assert service.status_text.endswith("; idle, 0 done")
    found = service.transcribe(clips["monkeys"])
    assert plain(found["text"]) == plain(clips["monkeys"].text)
    service.machine.until(lambda: service.status_text.endswith("; idle, 1 done"), "the request is counted")


def test_the_queue_is_shown(service: Service, clips: dict[str, Clip]) -> None:
    """The status line shows running requests and waiting windows."""
    with service.load(clips["monkeys"]):
        service.machine.until(lambda: " running, " in service.status_text, "running requests are shown")


def test_the_first_request_starts_it(service: Service, clips: dict[str, Clip]) -> None:
    """Requests that come while the service is down wait in the socket and are answered."""
    service.systemctl("stop")
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda _: service.transcribe(clips["monkeys"])["text"], range(CLIENTS)))
    assert [plain(answer) for answer in answers] == [plain(clips["monkeys"].text)] * CLIENTS
    assert service.machine.show("NRestarts") == "0"


def test_reload_good(service: Service) -> None:
    """reload returns when the new configuration is in effect, in the same process."""
    pid = service.pid
    service.configure(MODEL + "\n[decode]\nbeam_size = 2")
    assert service.systemctl("reload") == 0
    assert service.values()["decode.beam_size"] == "2"
    assert service.machine.show("ReloadResult") == "success"
    assert service.pid == pid


def test_reload_bad(service: Service, clips: dict[str, Clip]) -> None:
    """A reload of a wrong file fails with the reason and changes nothing; the next good one clears the error."""
    since = service.machine.cursor()
    service.configure("models = 3")
    assert service.systemctl("reload", check=False) == 1
    assert service.machine.show("ActiveState") == "active"
    assert service.machine.show("ReloadResult") == "exit-code"
    reason = "whisperd.toml:2: models: expects an array, got 3"
    assert f"last reload failed: /etc/whisperd/{reason}; serving tiny" in service.status_text
    service.machine.journal_until(since, f"reload failed, everything stays as it was: /etc/whisperd/{reason}", "3")
    service.machine.journal_until(since, f"whisperd: /etc/whisperd/{reason}", "3")  # the command's own words
    assert plain(service.transcribe(clips["monkeys"])["text"]) == plain(clips["monkeys"].text)
    service.configure()
    assert service.systemctl("reload") == 0
    assert service.status_text.startswith("serving tiny")


def test_reload_by_signal(service: Service) -> None:
    """SIGHUP reloads too; the unit is active again afterwards, also after a wrong file."""
    service.configure("models = 3")
    service.systemctl("kill", "-s", "HUP")
    service.machine.until(lambda: "last reload failed" in service.status_text, "the failure is told")
    service.machine.until(lambda: service.machine.show("ActiveState") == "active", "it is active")
    service.configure(MODEL + "\n[decode]\nbeam_size = 3")
    service.systemctl("kill", "-s", "HUP")
    service.machine.until(lambda: service.values()["decode.beam_size"] == "3", "the new file is in effect")
    service.machine.until(lambda: service.machine.show("ActiveState") == "active", "it is active")


def test_a_burst_of_reloads(service: Service, clips: dict[str, Clip]) -> None:
    """Fifty reloads under load end, the newest file is in effect, and no request fails."""
    pid = service.pid
    with service.load(clips["monkeys"]) as load:
        for number in range(1, BURST):
            service.configure(MODEL + f"\n[decode]\nbest_of = {1 + number % 30}")
            service.systemctl("--no-block", "reload")
        service.configure(MODEL + "\n[decode]\nbest_of = 32")
        assert service.systemctl("reload") == 0
        assert service.values()["decode.best_of"] == "32"
    assert load.failures == {}
    service.machine.until(lambda: service.machine.show("ActiveState") == "active", "it is active")
    assert (service.pid, service.machine.show("NRestarts")) == (pid, "0")


def test_an_edit_during_the_boot(service: Service) -> None:
    """A reload that is requested during a start is merged into it, and the newest file is served."""
    service.systemctl("stop")
    since = service.machine.cursor()
    service.systemctl("--no-block", "start")
    service.machine.journal_until(since, "config: /etc/whisperd")
    service.configure(MODEL + "\n[decode]\nbeam_size = 4")
    assert service.systemctl("reload") == 0
    assert service.values()["decode.beam_size"] == "4"


def test_restart_under_load(service: Service, clips: dict[str, Clip]) -> None:
    """No request fails during three restarts."""
    pids = {service.pid}
    with service.load(clips["monkeys"]) as load:
        for _ in range(3):
            assert service.systemctl("restart") == 0
            pids.add(service.pid)
    assert load.failures == {}
    assert len(pids) == 4


def test_stop_drains(service: Service, clips: dict[str, Clip]) -> None:
    """A request in flight is answered before the daemon ends, and the unit's result is success."""
    begun = threading.Event()

    def request() -> str:
        with clips["instruct"].path.open("rb") as file:
            answer = service.client.transcribe(file, filename="x", fields={}, on_event=lambda _kind, _data: begun.set())
        return str(answer["text"])

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(request)
        assert begun.wait(30)
        service.systemctl("stop")
        assert "disconnect from the pbx" in plain(running.result(PATIENCE_S))
    assert (service.machine.show("Result"), service.machine.show("ExecMainStatus")) == ("success", "0")


def test_kill(service: Service, clips: dict[str, Clip]) -> None:
    """After SIGKILL only what was in flight is lost; the service restarts, and the socket stays open."""
    socket = f"/proc/{service.machine.pid}/root{SOCKET}"
    inode = service.machine.run("stat", "-c", "%i", SOCKET).stdout
    with service.load(clips["monkeys"]) as load:
        service.systemctl("kill", "-s", "KILL")
        service.machine.until(lambda: service.machine.show("NRestarts") == "1", "it is started again")
        service.machine.until(lambda: service.machine.show("ActiveState") == "active", "it serves again")
    assert sum(load.failures.values()) <= CLIENTS, load.failures
    assert service.machine.run("stat", "-c", "%i", SOCKET).stdout == inode, socket


def test_the_engine_is_killed(service: Service, clips: dict[str, Clip]) -> None:
    """An engine in its own process works in the sandbox; when it is killed, no request fails and nothing restarts."""
    service.configure(f"{MODEL}\n[engine]\nown_process = true")
    service.systemctl("restart")
    since = service.machine.cursor()
    with service.load(clips["monkeys"]) as load:
        (model,) = service.client.status()["models"]
        inside = int(str(model["engine_pid"]))
        assert service.machine.run("cat", f"/proc/{inside}/oom_score_adj").stdout.strip() == "500"
        service.machine.run("sh", "-c", f"kill -9 {inside}")
        service.machine.journal_until(since, "was killed (SIGKILL): out of memory?", "3")
        service.machine.until(lambda: service.status_text.startswith("serving tiny (cpu, int8"), "it serves again")
    assert load.failures == {}
    assert service.machine.show("NRestarts") == "0"
    assert service.machine.show("ActiveState") == "active"
    service.systemctl("stop")
    assert service.machine.run("sh", "-c", f"test -d /proc/{inside}", check=False).returncode == 1


def test_watchdog(service: Service, clips: dict[str, Clip]) -> None:
    """A hung engine is killed, logs where it was, and is started again."""
    # nothing can hang CTranslate2 on purpose, so a batch that takes long counts as hung
    service.drop_in("WatchdogSec=1s")
    slow = "workers = 1\nthreads_per_worker = 1\nbatch_size = 64\nstall_timeout_s = 0.2"
    service.configure(f"{MODEL}\n[engine]\n{slow}\n[decode]\nbeam_size = 32")
    service.systemctl("restart")
    since = service.machine.cursor()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(service.transcribe, clips["instruct"], vad_filter="false") for _ in range(8)]
        service.machine.until(lambda: service.machine.show("NRestarts") == "1", "the watchdog has struck")
        service.configure()
        service.machine.until(lambda: service.machine.show("ActiveState") == "active", "it serves again")
        for one in asked:
            one.exception(timeout=120)
    service.machine.journal_until(since, "Watchdog timeout")
    service.machine.journal_until(since, "Fatal Python error: Aborted")
    service.systemctl("restart")
    assert service.transcribe(clips["monkeys"])["text"]


def test_a_wrong_configuration_at_boot(service: Service, clips: dict[str, Clip]) -> None:
    """The unit does not restart in a loop; waiting clients get the reason; correcting the file is enough."""
    service.systemctl("stop")
    service.configure("models = 3")
    assert service.systemctl("start", check=False) == 1
    shown = {name: service.machine.show(name) for name in ("ExecMainStatus", "NRestarts", "StatusErrno")}
    assert shown == {"ExecMainStatus": "78", "NRestarts": "0", "StatusErrno": "22"}
    assert service.status_text == "/etc/whisperd/whisperd.toml:2: models: expects an array, got 3"
    for _ in range(2 * CLIENTS):
        with pytest.raises(RemoteError, match="models: expects an array, got 3") as caught:
            service.transcribe(clips["monkeys"])
        assert (caught.value.status, caught.value.remote_exit_code) == (503, 78)
    assert service.machine.show("ActiveState", "whisperd.socket") == "active"
    service.configure()
    assert plain(service.transcribe(clips["monkeys"])["text"]) == plain(clips["monkeys"].text)


def test_a_model_that_is_not_there(service: Service, clips: dict[str, Clip]) -> None:
    """Another failure to start is retried; clients that wait meanwhile get the reason."""
    service.systemctl("stop")
    service.configure('models = ["path:/srv/nothing"]')
    with pytest.raises(RemoteError, match="/srv/nothing") as caught:
        service.transcribe(clips["monkeys"])
    assert caught.value.status == 503
    service.machine.until(lambda: int(service.machine.show("NRestarts")) >= 1, "it is tried again")
    service.configure()
    service.machine.until(lambda: service.machine.show("ActiveState") == "active", "it serves")


def test_stop_during_the_boot(service: Service) -> None:
    """A stop does not wait for the end of the boot, and is no failure."""
    service.systemctl("stop")
    service.systemctl("--no-block", "start")
    service.machine.until(lambda: service.status_text, "it is on its way")
    service.systemctl("stop")
    assert service.machine.show("Result") == "success"


def test_a_download_longer_than_the_time_to_start(service: Service, clips: dict[str, Clip]) -> None:
    """While bytes arrive a start may take longer than TimeoutStartSec; the status line shows the progress."""
    service.systemctl("stop")
    service.empty_cache()
    service.drop_in("TimeoutStartSec=10s")  # the first progress may take seconds on a busy machine
    service.configure(service.hub_start(faults=[{"match": "GET /cdn/", "rate_bytes_per_s": 4e6}]))
    service.systemctl("--no-block", "start")
    service.machine.until(lambda: " % of 78.1 MB" in service.status_text, "the progress is shown")
    assert service.status_text.startswith("downloading org/tiny: ")
    with pytest.raises(RemoteError, match="downloading org/tiny: ") as caught:
        service.transcribe(clips["monkeys"])
    assert caught.value.status == 503
    service.machine.until(lambda: service.machine.show("ActiveState") == "active", "it serves")
    started, ready = (
        int(service.machine.show(f"{name}TimestampMonotonic")) for name in ("ExecMainStart", "ActiveEnter")
    )
    assert ready - started > 13_000_000
    assert service.machine.show("NRestarts") == "0"
    assert service.transcribe(clips["monkeys"])["text"]


def test_a_download_that_stands_still(service: Service) -> None:
    """When no byte arrives, the start timeout is not extended."""
    service.systemctl("stop")
    service.empty_cache()
    service.drop_in("TimeoutStartSec=4s", "TimeoutStopSec=10s", "Restart=no")
    service.configure(service.hub_start(faults=[{"match": "GET /(cdn|org/tiny/resolve)/", "stall_at": 0}]))
    assert service.systemctl("start", check=False) == 1
    assert service.machine.show("Result") == "timeout"


def test_boot_without_network(service: Service, clips: dict[str, Clip]) -> None:
    """A machine that has the models boots without a Hub, also from a read-only cache."""
    service.empty_cache()
    service.configure(service.hub_start())
    assert service.systemctl("restart") == 0
    service.hub_stop()
    assert service.systemctl("restart") == 0
    assert service.transcribe(clips["monkeys"])["text"]
    service.drop_in("CacheDirectory=", "ReadOnlyPaths=/var/cache/whisperd")
    assert service.systemctl("restart") == 0
    assert service.status_text.startswith("serving org/tiny (cpu, ")
    assert service.transcribe(clips["monkeys"])["text"]


def test_the_token(service: Service) -> None:
    """The credential opens a private repository, and is in no environment, command line or journal."""
    service.systemctl("stop")
    service.empty_cache()
    text = service.hub_start(token=TOKEN, faults=[{"match": "GET /cdn/", "rate_bytes_per_s": 33e6}])
    service.configure(text)
    assert service.systemctl("start", check=False) == 1
    assert "org/tiny" in service.status_text
    service.systemctl("stop")
    service.machine.write("/etc/credstore/hf-token", TOKEN + "\n", 0o600)
    try:
        service.systemctl("--no-block", "start")
        service.machine.until(lambda: service.status_text.startswith("downloading"), "it downloads with the token")
        assert service.holders(TOKEN) == {int(service.machine.show("MainPID", "hub.service"))}
        service.machine.until(lambda: service.machine.show("ActiveState") == "active", "it serves")
        assert not any(TOKEN in text for entry in service.machine.journal() for text in entry.values())
    finally:
        (service.machine.root / "etc/credstore/hf-token").unlink()


def test_the_timer_moves_models_forward(service: Service, clips: dict[str, Clip]) -> None:
    """The reconcile unit moves a branch, and the running daemon switches to it without a restart."""
    service.empty_cache()
    service.configure(service.hub_start())
    service.systemctl("restart")
    (before,) = service.client.models()
    pid = service.pid
    service.configure(service.hub_start(commits=2))
    service.machine.run("systemctl", "start", "whisperd-reconcile.service")
    (after,) = service.client.models()
    assert after["revision"] != before["revision"]
    assert service.pid == pid
    assert service.transcribe(clips["monkeys"])["text"]


def test_permissions(service: Service) -> None:
    """The socket is for root and the group; others get the name of the group; members may not reload."""
    run = service.machine.run
    assert run("stat", "-c", "%U %G %a", SOCKET).stdout == "root whisperd 660\n"
    for arguments in (["status"], ["status", "--socket", SOCKET]):
        refused = run("setpriv", "--reuid=nobody", "--clear-groups", "whisperd", *arguments, check=False)
        assert refused.returncode == 77
        assert "permission denied" in refused.stderr
        assert "join the group whisperd" in refused.stderr
    member = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--groups=whisperd", "whisperd")
    told = run(*member, "transcribe", "/srv/monkeys.flac")
    assert "monkeys" in told.stdout
    assert run(*member, "reload", check=False).returncode == 77


def test_the_journal(service: Service, clips: dict[str, Clip]) -> None:
    """A request is one line of level info, with fields to search by, and nothing of the transcript."""
    since = service.machine.cursor()
    service.transcribe(clips["monkeys"])
    service.machine.journal_until(since, "/v1/audio/transcriptions 200")
    (entry,) = [found for found in service.machine.journal(since) if "WHISPERD_REQUEST_ID" in found]
    assert (entry["PRIORITY"], entry["WHISPERD_STATUS"], entry["WHISPERD_MODEL"]) == ("6", "200", "tiny")
    assert (entry["_SYSTEMD_UNIT"], entry["SYSLOG_IDENTIFIER"]) == (UNIT, "whisperd")
    assert 0 < int(entry["WHISPERD_WALL_MS"]) < 60_000
    assert float(entry["WHISPERD_AUDIO_S"]) > 1
    found = service.machine.run(
        "journalctl", "-o", "cat", "--no-pager", f"WHISPERD_REQUEST_ID={entry['WHISPERD_REQUEST_ID']}"
    )
    assert found.stdout.count("\n") == 1
    assert not any("carried away" in entry["MESSAGE"] for entry in service.machine.journal())


def test_the_sandbox(service: Service) -> None:
    """The restrictions of the unit hold for the process; only cache, state and temporary files can be written."""
    status = service.machine.run("cat", f"/proc/{service.pid}/status").stdout
    facts = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert (facts["NoNewPrivs"], facts["Seccomp"], int(facts["CapBnd"], 16)) == ("1", "2", 0)
    code = (
        "import pathlib, sys\nfor name in sys.argv[1:]:\n try: pathlib.Path(name, 'x').touch(); print(name)\n"
        " except OSError: pass"
    )
    directories = ("/etc/whisperd", "/usr/lib/whisperd", "/run", "/srv", "/var/lib", "/var/cache")
    own = ("/var/cache/whisperd", "/var/lib/whisperd", "/var/tmp")
    inside = service.machine.run(
        "nsenter", "-t", str(service.pid), "-m", "setpriv", "--reuid=whisperd", "--regid=whisperd", "--clear-groups",
        "python3", "-c", code, *directories, *own,
    )  # fmt: skip
    assert inside.stdout.split() == list(own)


def test_files_are_right(service: Service) -> None:
    """systemd reports no problem in the units as they are installed."""
    units = ("whisperd.service", "whisperd.socket", "whisperd-reconcile.service", "whisperd-reconcile.timer")
    checked = service.machine.run("systemd-analyze", "verify", "--man=no", *units)
    assert checked.stderr == ""
