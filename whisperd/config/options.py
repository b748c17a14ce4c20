"""All options of whisperd.toml, each declared once: type, default, bounds, help, and when a change takes effect."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from whisperd.config.models import ModelTable, Table

DEFAULT_MODEL = "openai/whisper-large-v3-turbo"

GIB = 1024**3
WORLD_WRITABLE = 0o002
IPV6 = 6
PORT = re.compile(r"[0-9]{1,5}")
PORT_MAX = 65_535
HOST = re.compile(r"[\w.-]+|[0-9a-f:.]+", re.IGNORECASE)
PRINTABLE = re.compile(r"[^\s\x00-\x20\x7f]+")

Reload = Literal["live", "restart"]


def option(default: Any, *, reload: Reload, help: str, **bounds: Any) -> Any:
    """Declares an option. ``reload``: ``live`` if a reload applies a change, ``restart`` if a restart is needed."""
    return Field(default=default, description=help, json_schema_extra={"reload": reload}, **bounds)


def _empty_is_unset(value: object) -> object:
    return None if value == "" else value


def _absolute(text: str | None) -> str | None:
    if text is not None and (not text.startswith(("/", "~/")) or "\0" in text):
        raise ValueError(f"expects an absolute path or ~/..., got {text!r}")
    return text


def _octal_mode(text: str) -> str:
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ValueError(f'expects an octal mode such as "0660", got {text!r}')
    if int(text, 8) & WORLD_WRITABLE:
        raise ValueError(f"must not let everybody write, got {text!r}; use socket_group to admit people")
    return text


def _url(text: str | None) -> str | None:
    return None if text is None else hub_address(text)


def hub_address(text: str) -> str:
    """An address of the Hub without a slash at the end; raises ValueError."""
    expected = "expects an http:// or https:// address"
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise ValueError(f"{expected} without a user or password; a token belongs in $HF_TOKEN or the credential")
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in ("http", "https") and HOST.fullmatch(parts.hostname or "") and parts.port != 0
    except ValueError:  # a port that is none, brackets without an address
        is_address = False
    if not is_address or not PRINTABLE.fullmatch(text) or "?" in text or "#" in text:
        raise ValueError(f"{expected}, got {text!r}")
    return text.rstrip("/")


def _tcp_address(text: str | None) -> str | None:
    if text is not None and not _is_tcp_address(text):
        raise ValueError(f'expects an address and a port as in "127.0.0.1:9000" or "[::1]:9000", got {text!r}')
    return text


def _is_tcp_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        version = ipaddress.ip_address(bare).version
    except ValueError:
        return False
    return (version == IPV6) == (bare != host) and bool(PORT.fullmatch(port)) and int(port) <= PORT_MAX


def _wyoming_address(text: str | None) -> str | None:
    if text is None or re.fullmatch(r"unix:/[^\x00]+", text) or _is_tcp_address(text):
        return text
    raise ValueError(f'expects "127.0.0.1:10300", "[::1]:10300" or "unix:/path", got {text!r}')


def _host_name(text: str) -> str:
    if not HOST.fullmatch(text):
        raise ValueError(f'expects a host\'s name without scheme, port or path, as in "speech.lan", got {text!r}')
    return text


Text = Annotated[str | None, BeforeValidator(_empty_is_unset)]
PathText = Annotated[Text, AfterValidator(_absolute)]
TcpAddress = Annotated[Text, AfterValidator(_tcp_address)]
WyomingAddress = Annotated[Text, AfterValidator(_wyoming_address)]
Url = Annotated[Text, AfterValidator(_url)]
HostName = Annotated[str, AfterValidator(_host_name)]
Mode = Annotated[str, AfterValidator(_octal_mode)]
Temperature = Annotated[float, Field(ge=0, le=1)]


class ServerTable(Table):
    """Listeners and connections."""

    socket: PathText = option(
        None, reload="restart", help="Path of the Unix socket; a socket that systemd passes comes first."
    )
    socket_mode: Mode = option("0660", reload="restart", help="Permissions of a socket that whisperd makes.")
    socket_group: Text = option(None, reload="restart", help="Group of a socket that whisperd makes.")
    spool_dir: PathText = option(None, reload="restart", help="Directory of uploads, on disk (/var/tmp).")
    shutdown_timeout_s: float = option(
        60.0, reload="restart", ge=0, le=3600, help="How long running requests may continue after a stop."
    )
    header_timeout_s: float = option(
        10.0, reload="restart", ge=0.1, le=3600, help="How long a client may take to send its headers."
    )
    idle_timeout_s: float = option(
        75.0, reload="restart", ge=0.1, le=3600, help="How long a connection without a request stays open."
    )
    tcp: TcpAddress = option(
        None, reload="restart", help='Listen here as well, as in "127.0.0.1:9000"; anything but loopback needs a key.'
    )
    tcp_key_file: PathText = option(
        None, reload="restart", help="File with the key that clients must send over TCP (Authorization: Bearer ...)."
    )
    tcp_hosts: tuple[HostName, ...] = option(
        (), reload="restart", help="Further names by which clients reach the TCP listener; others are refused."
    )

    wyoming: WyomingAddress = option(
        None,
        reload="restart",
        help='Speak the Wyoming protocol at "127.0.0.1:10300" or "unix:/path" (whisperd[wyoming]); it has no keys: '
        "every client that can connect may transcribe.",
    )

    @model_validator(mode="after")
    def _loopback_or_key(self) -> ServerTable:
        if self.tcp and not self.tcp_key_file and not self.tcp.startswith(("127.", "[::1]:")):
            raise ValueError(f"tcp at {self.tcp!r} is no loopback address; set tcp_key_file, or use 127.0.0.1")
        return self


class EngineTable(Table):
    """Device and batches of the engine."""

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto",
        reload="restart",
        help="auto: a GPU that PyTorch can use (whisperd[cuda]), else the cpu; the log says why.",
    )
    compute_type: Literal["auto", "int8", "int8_float32", "float32", "float16", "bfloat16", "int8_float16"] = option(
        "auto", reload="restart", help="Number format; auto: int8 on the cpu, float16 on a GPU."
    )
    encoder: Literal["auto", "ctranslate2", "openvino"] = option(
        "auto",
        reload="restart",
        help="What encodes on the cpu; auto: OpenVINO where it is installed (whisperd[openvino]), else CTranslate2.",
    )
    batch_size: int = option(
        4, reload="restart", ge=1, le=512, help="Windows of 30 s that one worker decodes together on the cpu."
    )
    workers: int = option(
        0,
        reload="restart",
        ge=0,
        le=256,
        help="Batches at the same time on the cpu; 0: as many as keep the cores busy.",
    )
    threads_per_worker: int = option(
        0,
        reload="restart",
        ge=0,
        le=256,
        help="Threads of each worker on the cpu; 0: up to four, and no more in all than there are cores.",
    )
    short_windows: Literal["auto", "always", "never"] = option(
        "auto",
        reload="restart",
        help="Do not pad short audio to 30 s (cpu), where its language is known: several times faster; auto: with "
        "small English models (tiny.en, base.en).",
    )
    gpu_bytes: int = option(
        0,
        reload="restart",
        ge=0,
        help="Memory of the GPU that one model may take; it decides how many windows are decoded together. "
        "0: nine tenths of what is free when the model is loaded, which leaves no room for a second one.",
    )
    fp8_cross: bool = option(
        False,
        reload="restart",
        help="Keep audio in the memory of the GPU in 8 bits: more windows at a time, and less to read for each token. "
        "Needs a card with 8-bit floats (Ada, Hopper); tested for accuracy on tiny.en only.",
    )
    own_process: bool = option(
        False,
        reload="restart",
        help="Run the cpu's engine in a process of its own, as that of a GPU always is: when it crashes or is killed "
        "for memory, the daemon starts it again and loses no request. It costs a second process.",
    )
    cpu_fallback: bool = option(
        False,
        reload="restart",
        help="While a GPU that was present cannot be used, serve on the cpu and report it; "
        "false: answer 503 until the GPU is back.",
    )
    stall_timeout_s: float = option(
        300.0,
        reload="restart",
        ge=0.1,
        le=86400,
        help="An engine that runs batches and finishes none for so long counts as hung: its process is replaced, or, "
        "if it has none of its own, systemd restarts the daemon.",
    )


class DecodeTable(Table):
    """Decoding, unless a request sets its own values."""

    beam_size: int = option(1, reload="live", ge=1, le=32, help="Beams at temperature 0; 1 is greedy.")
    best_of: int = option(5, reload="live", ge=1, le=32, help="Samples at temperatures above 0; the likeliest wins.")
    temperatures: tuple[Temperature, ...] = option(
        (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        reload="live",
        min_length=1,
        help="The first for every window; one that fails a test below is decoded again with the next.",
    )
    compression_ratio_threshold: float = option(
        2.4, reload="live", ge=1, allow_inf_nan=True, help="A text more repetitive than this fails; inf: none does."
    )
    log_prob_threshold: float = option(
        -1.0,
        reload="live",
        le=0,
        allow_inf_nan=True,
        help="A text less likely than this fails (mean log probability of a token); -inf: none does.",
    )
    no_speech_threshold: float = option(
        0.6,
        reload="live",
        ge=0,
        le=1,
        help="Above it, a text that is not likely either is taken for silence; 1.0: never.",
    )
    prompt: Text = option(None, reload="live", help="Text that precedes every window, as if it had been spoken.")


class VadTable(Table):
    """Voice activity detection."""

    filter: bool = option(True, reload="live", help="Transcribe only speech.")
    threshold: float = option(
        0.5, reload="live", ge=0, le=1, help="Probability of speech from which a sound counts as speech."
    )
    min_silence_ms: int = option(160, reload="live", ge=0, le=60_000, help="A shorter silence does not end speech.")
    speech_pad_ms: int = option(400, reload="live", ge=0, le=15_000, help="Audio kept before and after speech.")


class LimitsTable(Table):
    """Limits beyond which requests are refused."""

    upload_bytes: int = option(2 * GIB, reload="live", ge=1024, help="Largest upload (2 GiB).")
    audio_s: float = option(21600.0, reload="live", ge=1, help="Longest audio (6 hours).")
    requests: int = option(
        64, reload="live", ge=1, le=100_000, help="Requests at the same time, waiting ones included."
    )
    queue_audio_s: float = option(
        172_800.0, reload="live", ge=1, help="Audio of all requests together that is not transcribed yet (2 days)."
    )
    spool_bytes: int = option(8 * GIB, reload="live", ge=1024, help="All uploads together on disk (8 GiB).")

    model_bytes: int = option(
        0,
        reload="live",
        ge=0,
        help="Most that the weights of loaded models may have together, as on disk; the least recently used one is "
        "unloaded. 0: no limit.",
    )
    model_idle_s: float = option(
        0.0,
        reload="live",
        ge=0,
        help="Models that are not used for so long are unloaded until the next request. 0: never.",
    )

    @model_validator(mode="after")
    def _spool_holds_an_upload(self) -> LimitsTable:
        if self.spool_bytes < self.upload_bytes:
            raise ValueError(
                f"spool_bytes must hold the largest upload: expects at least upload_bytes, {self.upload_bytes}, "
                f"got {self.spool_bytes}"
            )
        return self


class ReconcileTable(Table):
    """Reconciling the cache with this file."""

    endpoint: Url = option(None, reload="live", help="Address of the Hub or a mirror (https://huggingface.co).")
    offline: bool = option(False, reload="live", help="Never connect to the Hub; the cache must be complete.")
    verify: bool = option(False, reload="live", help="Hash every file at each reconcile, not only new ones.")
    metadata_timeout_s: float = option(10.0, reload="live", ge=0.1, le=600, help="How long the Hub may take to answer.")
    stall_timeout_s: float = option(
        60.0,
        reload="live",
        ge=1,
        le=3600,
        help="A download that brings less than 1 kB/s for this long fails.",
    )
    parallel: int = option(2, reload="live", ge=1, le=16, help="Models downloaded at the same time.")
    prune: bool = option(
        False, reload="live", help="Remove what whisperd has fetched and this file no longer declares."
    )
    max_cache_bytes: int = option(
        0, reload="live", ge=0, help="Refuse downloads that would make the whole cache larger than this (0: no limit)."
    )


class LogTable(Table):
    """Format of the log."""

    format: Literal["auto", "plain", "journal"] = option(
        "auto", reload="restart", help="auto: journal where stderr leads to the journal."
    )


class Config(Table):
    """All of whisperd.toml."""

    requires: Text = option(None, reload="live", help='Versions of whisperd that may read this file, as in ">=0.1".')
    models: tuple[ModelTable, ...] = option(
        (), reload="live", help="What is kept on disk and served; the first is the default."
    )
    force: bool = option(False, reload="live", help="Fetch every file anew at each start, reload and reconcile.")
    cache_dir: PathText = option(
        None, reload="restart", help="A plain Hugging Face cache, shared with other tools (~/.cache/huggingface/hub)."
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", reload="live", help="The least serious messages that are logged."
    )

    server: ServerTable = ServerTable()
    engine: EngineTable = EngineTable()
    decode: DecodeTable = DecodeTable()
    vad: VadTable = VadTable()
    limits: LimitsTable = LimitsTable()
    reconcile: ReconcileTable = ReconcileTable()
    log: LogTable = LogTable()

    @field_validator("requires")
    @classmethod
    def _is_a_specifier(cls, text: str | None) -> str | None:
        from packaging.specifiers import InvalidSpecifier, SpecifierSet

        try:
            SpecifierSet(text or "")
        except InvalidSpecifier as error:
            raise ValueError(f'expects a version specifier such as ">=0.1", got {text!r}') from error
        return text

    @field_validator("models")
    @classmethod
    def _names_are_unique(cls, models: tuple[ModelTable, ...]) -> tuple[ModelTable, ...]:
        counts = Counter(name for model in models for name in model.names)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"names and aliases must differ, used more than once: {', '.join(map(repr, twice))}")
        return models
