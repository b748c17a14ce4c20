"""Actions of clients in a long run: correct requests, malformed ones, and requests that are abandoned."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from whisperd.client import TRANSCRIPTIONS, Client
from whisperd.errors import DaemonUnreachable, Error, RemoteError

PATIENCE_S = 600.0
LEAVE_AFTER_S = 0.7
IDLE_S = 2.0
HEAD = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\n"
HALF_AN_UPLOAD = (
    HEAD + b"Content-Length: 100000\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nhalf of it'
)
MALFORMED = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"GET /readyz HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\nno chunk\r\n",
    HEAD + b"Content-Type: multipart/form-data\r\nContent-Length: 3\r\n\r\nabc",
    HEAD + b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 9\r\n\r\nno parts!",
)
ALIASES = ("whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe")
BAD_CONFIG = 'models = 3\nlog_levle = "info"\n'

Fields = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """An action of a client, its weight among all actions, and the outcomes that are correct."""

    do: Callable[[], str]
    weight: int
    allowed: frozenset[str]

    @property
    def name(self) -> str:
        """The name under which outcomes are counted."""
        return self.do.__name__

    def outcome(self) -> str:
        """Performs the action; returns its outcome: a word of its own, or the code of the error."""
        try:
            return self.do()
        except DaemonUnreachable:
            return "cut off"
        except Error as error:
            return str(getattr(error, "remote_code", type(error).__name__))
        except (OSError, LookupError, http.client.HTTPException) as error:
            return repr(error)


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("whisperd", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


class Clients:
    """The actions on one daemon.

    Args:
        path: its socket.
        pid: its process, for signals.
        config: its configuration file, which an action breaks and repairs.
        clip, long: the recordings that are sent.
    """

    def __init__(self, path: Path, pid: int, config: Path, clip: Path, long: Path) -> None:
        self._path = path
        self._pid = pid
        self._config = config
        self._good_config = config.read_text()
        self._editor = threading.Lock()
        self._clip = clip
        self._long = long

    def actions(self) -> Sequence[Action]:
        """Every action once."""
        table: list[tuple[Callable[[], str], int, set[str]]] = [
            (self.clip, 50, {"done"}),
            (self.long_file, 6, {"done"}),
            (self.leave, 8, {"cut off", "done"}),
            (self.stream_and_leave, 6, {"left"}),
            (self.words, 6, {"done"}),
            (self.subtitles, 6, {"done"}),
            (self.several_languages, 3, {"done"}),
            (self.wrong_language, 2, {"invalid_value"}),
            (self.by_alias, 4, {"done"}),
            (self.look, 6, {"done"}),
            (self.half_an_upload, 6, {"left"}),
            (self.no_audio, 6, {"audio_decode_error"}),
            (self.wrong_field, 4, {"invalid_value"}),
            (self.wrong_model, 4, {"model_not_found"}),
            (self.malformed, 3, {"refused"}),
            (self.idle_connection, 3, {"left"}),
            (self.half_a_head, 3, {"left"}),
            (self.reload, 1, {"done", "config_error"}),
            (self.hang_up, 1, {"sent"}),
            (self.break_and_heal, 1, {"refused, healed"}),
        ]
        return [Action(do=do, weight=weight, allowed=frozenset(allowed)) for do, weight, allowed in table]

    def clip(self) -> str:
        return self._transcribe(Client(self._path, PATIENCE_S), self._clip)

    def long_file(self) -> str:
        return self._transcribe(Client(self._path, PATIENCE_S), self._long)

    def leave(self) -> str:
        client = Client(self._path, PATIENCE_S)
        timer = threading.Timer(LEAVE_AFTER_S, client.abort)
        timer.start()
        try:
            return self._transcribe(client, self._long)
        finally:
            timer.cancel()

    def stream_and_leave(self) -> str:
        connection = self._post(self._long, [("stream", "true")])
        response = connection.getresponse()
        heard = any(line.startswith(b"event: transcript.text.delta") for line in response)
        connection.close()
        response.close()
        return _unless(heard, "left", "no delta")

    def words(self) -> str:
        fields = [("response_format", "verbose_json"), ("timestamp_granularities[]", "word")]
        return _unless(json.loads(self._text(fields))["words"], "done", "no words")

    def subtitles(self) -> str:
        return _unless(self._text([("response_format", "srt")]).startswith("1\n00:00:"), "done", "no subtitles")

    def several_languages(self) -> str:
        self._text([("languages[]", "en"), ("languages[]", "english"), ("languages[]", "fr")])
        return "done"

    def wrong_language(self) -> str:
        """Asks an English model for another language."""
        self._text([("languages[]", "fr")])
        return "done"

    def by_alias(self) -> str:
        return _unless(json.loads(self._text([("model", random.choice(ALIASES))]))["text"], "done", "no text")

    def look(self) -> str:
        for path in ("/v1/whisperd/status", "/metrics", "/v1/models", "/readyz", "/openapi.json"):
            connection = UnixConnection(self._path)
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            connection.close()
            if response.status != http.client.OK:
                return f"{path}: {response.status}"
        return "done"

    def half_an_upload(self) -> str:
        self._send(HALF_AN_UPLOAD)
        return "left"

    def no_audio(self) -> str:
        return self._transcribe(Client(self._path, PATIENCE_S), Path(__file__))

    def wrong_field(self) -> str:
        return self._transcribe(Client(self._path, PATIENCE_S), self._clip, beem_size="2")

    def wrong_model(self) -> str:
        return self._transcribe(Client(self._path, PATIENCE_S), self._clip, model="no-such-model")

    def malformed(self) -> str:
        """Sends each malformed request; each is refused or its connection is closed."""
        others = {self._raw(data) for data in MALFORMED} - {"400", "431", "closed"}
        return _unless(not others, "refused", others)

    def idle_connection(self) -> str:
        self._send(b"", IDLE_S)
        return "left"

    def half_a_head(self) -> str:
        self._send(HEAD, IDLE_S)
        return "left"

    def reload(self) -> str:
        Client(self._path, PATIENCE_S).reload()
        return "done"

    def hang_up(self) -> str:
        os.kill(self._pid, signal.SIGHUP)
        return "sent"

    def break_and_heal(self) -> str:
        """Writes a configuration with a mistake, then the correct one; reloads after both, one client at a time."""
        client = Client(self._path, PATIENCE_S)
        with self._editor:
            self._write(BAD_CONFIG)
            refused = Action(do=self.reload, weight=0, allowed=frozenset()).outcome()
            self._write(self._good_config)
            client.reload()
        return _unless(refused == "config_error", "refused, healed", refused)

    def _write(self, text: str) -> None:
        """Replaces the file atomically, as editors do."""
        fresh = self._config.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self._config)

    def _transcribe(self, client: Client, path: Path, **fields: str) -> str:
        with path.open("rb") as file:
            found = client.transcribe(file, filename=path.name, fields=fields, on_event=lambda _kind, _data: None)
        return _unless(found["text"], "done", "no text")

    def _text(self, fields: Fields) -> str:
        """Transcribes the clip; returns the body of the answer."""
        connection = self._post(self._clip, fields)
        response = connection.getresponse()
        body = response.read().decode()
        connection.close()
        if response.status != http.client.OK:
            raise RemoteError(body, status=response.status, code=json.loads(body)["error"]["code"])
        return body

    def _post(self, path: Path, fields: Fields) -> UnixConnection:
        parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
        head = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{path.name}"\r\n\r\n'
        body = "".join([*parts, head]).encode() + path.read_bytes() + b"\r\n--b--\r\n"
        connection = UnixConnection(self._path)
        connection.request("POST", TRANSCRIPTIONS, body, {"Content-Type": "multipart/form-data; boundary=b"})
        return connection

    def _raw(self, data: bytes) -> str:
        """Sends bytes; returns the status of the answer."""
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(PATIENCE_S)
            raw.connect(str(self._path))
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            found = raw.recv(65536).split()
        return found[1].decode() if found else "closed"

    def _send(self, data: bytes, wait_s: float = 0.0) -> None:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(self._path))
            raw.sendall(data)
            time.sleep(wait_s)


def _unless(well: object, outcome: str, otherwise: object) -> str:
    """The outcome, if the condition holds."""
    return outcome if well else str(otherwise)
