"""More than one daemon: a second instance from the templates, and one of a user without rights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.speech import Clip, plain
from tests.systemd.machine import Machine
from tests.systemd.service import CACHE, MODEL, PATIENCE_S, Service
from whisperd.client import Client
from whisperd.errors import RemoteError

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(2400)]

EXAMPLES = "/usr/share/doc/whisperd/examples"
SECOND = "whisperd@second.service"
USER = "someone"


def text_of(machine: Machine, path: str, clip: Clip) -> str:
    """The transcript of a recording by the daemon behind this socket."""
    client = Client(Path(f"/proc/{machine.pid}/root{path}"), PATIENCE_S)
    with clip.path.open("rb") as file:
        answer = client.transcribe(file, filename=clip.path.name, fields={}, on_event=lambda *_: None)
    return plain(str(answer["text"]))


def test_a_second_instance(service: Service, clips: dict[str, Clip]) -> None:
    """It has a socket and a configuration of its own; neither instance affects the other."""
    machine, clip = service.machine, clips["monkeys"]
    machine.run("sh", "-c", f"cp {EXAMPLES}/whisperd@.* /etc/systemd/system/")
    machine.run("systemctl", "daemon-reload")
    own = f'cache_dir = "{CACHE}"\n{MODEL}\n'
    machine.write("/etc/whisperd/second.toml", own)
    machine.run("systemctl", "start", "whisperd@second.socket")
    try:
        first = service.pid
        assert text_of(machine, "/run/whisperd-second.sock", clip) == plain(clip.text)
        assert machine.run("stat", "-c", "%U %G %a", "/run/whisperd-second.sock").stdout == "root whisperd 660\n"
        machine.write("/etc/whisperd/second.toml", own + "[decode]\nbeam_size = 2\n")
        machine.run("systemctl", "reload", SECOND)
        assert service.values()["decode.beam_size"] != "2"
        machine.write("/etc/whisperd/second.toml", "models = 3")
        assert machine.run("systemctl", "reload", SECOND, check=False).returncode == 1
        assert machine.run("systemctl", "restart", SECOND, check=False).returncode == 1
        with pytest.raises(RemoteError, match="models: expects an array, got 3"):
            text_of(machine, "/run/whisperd-second.sock", clip)
        assert plain(service.transcribe(clip)["text"]) == plain(clip.text)
        assert service.pid == first
    finally:
        machine.run("systemctl", "stop", "whisperd@second.socket", SECOND)
        machine.run("sh", "-c", "rm /etc/systemd/system/whisperd@.* /etc/whisperd/second.toml")
    assert plain(service.transcribe(clip)["text"]) == plain(clip.text)


@pytest.mark.every_debian
def test_an_instance_of_a_user(service: Service, clips: dict[str, Clip]) -> None:
    """systemctl --user starts, reloads and stops the user's own daemon, which no other user can reach."""
    machine, clip = service.machine, clips["monkeys"]
    machine.run("useradd", "--create-home", USER)
    uid = machine.run("id", "-u", USER).stdout.strip()
    home, runtime = f"/home/{USER}", f"/run/user/{uid}"
    machine.run("systemctl", "start", f"user@{uid}.service")

    def as_user(*command: str, check: bool = True) -> str:
        user = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
        environment = ("env", f"HOME={home}", f"XDG_RUNTIME_DIR={runtime}")
        done = machine.run(*user, *environment, *command, check=check)
        return done.stdout if check else f"{done.returncode} {done.stderr}"

    try:
        as_user("mkdir", "-p", f"{home}/.config/systemd/user", f"{home}/.config/whisperd")
        as_user("sh", "-c", f"cp {EXAMPLES}/user/whisperd.* {home}/.config/systemd/user/")
        configuration = f"{home}/.config/whisperd/whisperd.toml"
        machine.write(configuration, f"{MODEL}\n")
        as_user("systemctl", "--user", "daemon-reload")
        as_user("systemctl", "--user", "enable", "--now", "whisperd.socket")
        told = as_user("sh", "-c", f"cd && whisperd transcribe /srv/{clip.path.name}")
        assert plain(told) == plain(clip.text)
        assert as_user("systemctl", "--user", "is-active", "whisperd.service") == "active\n"
        assert as_user("systemctl", "--user", "show", "--value", "-p", "StatusText", "whisperd.service").startswith(
            "serving tiny"
        )
        socket = f"{runtime}/whisperd/whisperd.sock"
        assert machine.run("stat", "-c", "%U %a", socket).stdout == f"{USER} 600\n"
        machine.write(configuration, "models = 3\n")
        assert as_user("systemctl", "--user", "reload", "whisperd.service", check=False).startswith("1 ")
        machine.write(configuration, f"{MODEL}\n[decode]\nbeam_size = 2\n")
        as_user("systemctl", "--user", "reload", "whisperd.service")
        as_user("systemctl", "--user", "stop", "whisperd.socket", "whisperd.service")
        assert machine.run("test", "-e", socket, check=False).returncode == 1
    finally:
        machine.run("systemctl", "stop", f"user@{uid}.service")
        machine.run("userdel", "--remove", USER, check=False)
    assert plain(service.transcribe(clip)["text"]) == plain(clip.text)
