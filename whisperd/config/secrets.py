"""Secrets: finds them, checks them, and strikes them out of a text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from whisperd.config.environment import expand, hf_home
from whisperd.config.options import Config
from whisperd.errors import ConfigError, Problem
from whisperd.files import read_small

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN")
CREDENTIAL = "hf-token"
SECRET_BYTES = 4096
PRINTABLE = re.compile(r"[!-~]+")
FRAGMENT_CHARS = 6  # a shorter piece of a secret is no secret, and is found in every text
HIDDEN = "***"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A secret for the Hub and where it was found; the secret is not in its repr."""

    value: str = field(repr=False)
    origin: str


def token(environ: Mapping[str, str]) -> Token | None:
    """The token for the Hub: the systemd credential, then the variables, then the file of ``hf auth login``.

    Raises ConfigError, without the secret, if the first one that is set could not be sent as a header.
    """
    for origin, data in _token_sources(environ):
        if data.strip():
            return Token(value=check_secret(data, where=origin, key="token"), origin=origin)
    return None


def checked_token(text: str, origin: str) -> Token:
    """A token that did not come from the environment; raises ConfigError, without the token."""
    return Token(value=check_secret(text.encode(), where=origin, key=""), origin=origin)


def tcp_key(config: Config, environ: Mapping[str, str]) -> str | None:
    """The key that clients must send over TCP; raises ConfigError, without the key."""
    if config.server.tcp_key_file is None:
        return None
    path = expand(config.server.tcp_key_file, environ)
    try:
        data = read_small(path, SECRET_BYTES)
    except OSError as error:
        raise _problem(str(path), "server.tcp_key_file", f"cannot be read: {error.strerror}") from error
    return check_secret(data, where=str(path), key="server.tcp_key_file")


def check_secret(data: bytes, *, where: str, key: str) -> str:
    """Checks the content of a file or variable and returns the secret; raises ConfigError that does not quote it."""
    text = data.strip().decode("latin-1")
    if PRINTABLE.fullmatch(text):
        return text
    n_lines = len(text.splitlines())
    if not text:
        got = "nothing"
    elif n_lines > 1:
        got = f"{n_lines} lines"
    else:
        got = "a space" if " " in text else "a character that is not printable ASCII"
    raise _problem(where, key, f"expects one line of printable ASCII without spaces, got {got}; write it again")


def known_secrets(config: Config, environ: Mapping[str, str]) -> frozenset[str]:
    """All texts that must not be shown: the content of each source, valid or not, and its lines and words."""
    found = [data for _, data in _token_sources(environ)]
    if config.server.tcp_key_file is not None:
        found.append(_read(expand(config.server.tcp_key_file, environ)))
    texts = {data.decode("utf-8", "replace").strip() for data in found}
    pieces = texts | {piece for text in texts for piece in (*text.splitlines(), *text.split())}
    return frozenset(piece for piece in pieces if len(piece) >= FRAGMENT_CHARS)


def hide(text: str, secrets: Iterable[str]) -> str:
    """Strikes each secret out of a text, also in the quoted forms of Python and of addresses."""
    forms = {form for secret in secrets for form in (secret, repr(secret)[1:-1], quote(secret, safe=""))}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return text


def _token_sources(environ: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Yields each place of a token and its content, the place that counts first."""
    if directory := environ.get("CREDENTIALS_DIRECTORY"):
        yield f"systemd credential {CREDENTIAL}", _read(Path(directory) / CREDENTIAL)
    for name in TOKEN_VARIABLES:
        yield f"${name}", environ.get(name, "").encode("utf-8", "surrogateescape")
    named = environ.get("HF_TOKEN_PATH")
    path = expand(named, environ) if named else hf_home(environ)[0] / "token"
    yield str(path), _read(path)


def _read(path: Path) -> bytes:
    """Reads a small file; empty if it cannot be read."""
    try:
        return read_small(path, SECRET_BYTES)
    except OSError:
        return b""


def _problem(where: str, key: str, message: str) -> ConfigError:
    return ConfigError(Problem(where=where, key=key, message=message))
