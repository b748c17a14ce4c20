"""A spelling of a language is converted to one of Whisper's codes, or refused with the nearest names."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.errors import RequestError
from whisperd.speech.languages import LANGUAGES, NAMES, OTHER_CODES, language_code, language_hint


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("en", "en"), (" EN ", "en"), ("English", "en"), ("eng", "en"), ("en-US", "en"), ("en_GB.UTF-8", "en"),
        ("pt-BR", "pt"), ("zh_CN", "zh"), ("zh-Hant-TW", "zh"), ("cmn-Hans-CN", "zh"), ("castilian", "es"),
        ("nb", "no"), ("nb-NO", "no"), ("nob", "no"), ("nn", "nn"), ("no", "no"), ("jv", "jw"), ("jw", "jw"),
        ("fil", "tl"), ("fil-PH", "tl"), ("iw", "he"), ("iw-IL", "he"), ("in", "id"), ("ji", "yi"), ("mo", "ro"),
        ("deu", "de"), ("ger", "de"), ("fra", "fr"), ("fre", "fr"), ("zho", "zh"), ("chi", "zh"), ("cmn", "zh"),
        ("jpn", "ja"), ("nld", "nl"), ("dut", "nl"), ("ces", "cs"), ("cze", "cs"), ("yue", "yue"), ("zh-yue", "yue"),
        ("haw", "haw"), ("Haitian Creole", "ht"), ("Norwegian Bokm\u00e5l", "no"), ("Farsi", "fa"), ("es-419", "es"),
    ],
)  # fmt: skip
def test_what_people_write(text: str, code: str) -> None:
    """Old and long codes, regions, scripts and English names give the code that Whisper has."""
    assert language_code(text) == language_hint(text) == code


def test_the_tables_agree() -> None:
    """Each alias is for a language of Whisper, none shadows a code, and each language has a code of three letters."""
    assert len(LANGUAGES) == 100
    assert set(NAMES.values()) | set(OTHER_CODES.values()) <= set(LANGUAGES)
    assert not set(OTHER_CODES) & set(LANGUAGES)
    long_codes = {code for other, code in OTHER_CODES.items() if len(other) == 3}
    assert long_codes | {"haw", "yue"} == set(LANGUAGES)


def test_unknown_languages() -> None:
    """An unknown name is refused with the nearest one; a hint may be a code that Whisper lacks."""
    for read in (language_code, language_hint):
        with pytest.raises(RequestError, match="did you mean 'french'") as caught:
            read("frnch")
        assert caught.value.param == "language"
    for code in ("ga", "ga-IE", "gle"):
        with pytest.raises(RequestError, match="unknown language"):
            language_code(code)
    assert (language_hint("GA-ie"), language_hint("gle")) == ("ga", "gle")


@given(st.text(max_size=20))
def test_any_text(text: str) -> None:
    """Any text gives a code of Whisper's or an error."""
    with suppress(RequestError):
        assert language_code(text) in LANGUAGES
