"""Languages of Whisper: its codes, their English names, and what else people write for them. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from whisperd.errors import RequestError

TAG = re.compile(r"[a-z]{2,3}(?:[-_.@].*)?")  # a code, with or without region or script, as in en-US or de_DE.UTF-8
SEPARATORS = re.compile(r"[-_.@]")

# fmt: off
LANGUAGES: Mapping[str, str] = {
    "en": "english", "zh": "chinese", "de": "german", "es": "spanish", "ru": "russian", "ko": "korean",
    "fr": "french", "ja": "japanese", "pt": "portuguese", "tr": "turkish", "pl": "polish", "ca": "catalan",
    "nl": "dutch", "ar": "arabic", "sv": "swedish", "it": "italian", "id": "indonesian", "hi": "hindi",
    "fi": "finnish", "vi": "vietnamese", "he": "hebrew", "uk": "ukrainian", "el": "greek", "ms": "malay",
    "cs": "czech", "ro": "romanian", "da": "danish", "hu": "hungarian", "ta": "tamil", "no": "norwegian",
    "th": "thai", "ur": "urdu", "hr": "croatian", "bg": "bulgarian", "lt": "lithuanian", "la": "latin",
    "mi": "maori", "ml": "malayalam", "cy": "welsh", "sk": "slovak", "te": "telugu", "fa": "persian",
    "lv": "latvian", "bn": "bengali", "sr": "serbian", "az": "azerbaijani", "sl": "slovenian", "kn": "kannada",
    "et": "estonian", "mk": "macedonian", "br": "breton", "eu": "basque", "is": "icelandic", "hy": "armenian",
    "ne": "nepali", "mn": "mongolian", "bs": "bosnian", "kk": "kazakh", "sq": "albanian", "sw": "swahili",
    "gl": "galician", "mr": "marathi", "pa": "punjabi", "si": "sinhala", "km": "khmer", "sn": "shona",
    "yo": "yoruba", "so": "somali", "af": "afrikaans", "oc": "occitan", "ka": "georgian", "be": "belarusian",
    "tg": "tajik", "sd": "sindhi", "gu": "gujarati", "am": "amharic", "yi": "yiddish", "lo": "lao",
    "uz": "uzbek", "fo": "faroese", "ht": "haitian creole", "ps": "pashto", "tk": "turkmen", "nn": "nynorsk",
    "mt": "maltese", "sa": "sanskrit", "lb": "luxembourgish", "my": "myanmar", "bo": "tibetan", "tl": "tagalog",
    "mg": "malagasy", "as": "assamese", "tt": "tatar", "haw": "hawaiian", "ln": "lingala", "ha": "hausa",
    "ba": "bashkir", "jw": "javanese", "su": "sundanese", "yue": "cantonese",
}
OTHER_NAMES: Mapping[str, str] = {
    "burmese": "my", "valencian": "ca", "flemish": "nl", "haitian": "ht", "letzeburgesch": "lb", "pushto": "ps",
    "panjabi": "pa", "moldavian": "ro", "moldovan": "ro", "sinhalese": "si", "castilian": "es", "mandarin": "zh",
    "filipino": "tl", "farsi": "fa", "dari": "fa", "bokmal": "no", "bokmål": "no", "norwegian bokmal": "no",
    "norwegian bokmål": "no", "norwegian nynorsk": "nn", "mandarin chinese": "zh", "simplified chinese": "zh",
    "traditional chinese": "zh", "brazilian portuguese": "pt", "modern greek": "el", "azeri": "az",
    "bangla": "bn", "serbo-croatian": "sr", "slovene": "sl",
}
# ISO 639: codes that were replaced, codes of 639-2 (both kinds) and 639-3, and the chief member of a macrolanguage
OTHER_CODES: Mapping[str, str] = {
    "iw": "he", "in": "id", "ji": "yi", "jv": "jw", "nb": "no", "fil": "tl", "mo": "ro", "sh": "sr",
    "eng": "en", "zho": "zh", "chi": "zh", "cmn": "zh", "deu": "de", "ger": "de", "spa": "es", "rus": "ru",
    "kor": "ko", "fra": "fr", "fre": "fr", "jpn": "ja", "por": "pt", "tur": "tr", "pol": "pl", "cat": "ca",
    "nld": "nl", "dut": "nl", "ara": "ar", "arb": "ar", "swe": "sv", "ita": "it", "ind": "id", "hin": "hi",
    "fin": "fi", "vie": "vi", "heb": "he", "ukr": "uk", "ell": "el", "gre": "el", "msa": "ms", "may": "ms",
    "zsm": "ms", "ces": "cs", "cze": "cs", "ron": "ro", "rum": "ro", "mol": "ro", "dan": "da", "hun": "hu",
    "tam": "ta", "nor": "no", "nob": "no", "tha": "th", "urd": "ur", "hrv": "hr", "bul": "bg", "lit": "lt",
    "lat": "la", "mri": "mi", "mao": "mi", "mal": "ml", "cym": "cy", "wel": "cy", "slk": "sk", "slo": "sk",
    "tel": "te", "fas": "fa", "per": "fa", "pes": "fa", "prs": "fa", "lav": "lv", "lvs": "lv", "ben": "bn",
    "srp": "sr", "hbs": "sr", "aze": "az", "azj": "az", "slv": "sl", "kan": "kn", "est": "et", "ekk": "et",
    "mkd": "mk", "mac": "mk", "bre": "br", "eus": "eu", "baq": "eu", "isl": "is", "ice": "is", "hye": "hy",
    "arm": "hy", "nep": "ne", "npi": "ne", "mon": "mn", "khk": "mn", "bos": "bs", "kaz": "kk", "sqi": "sq",
    "alb": "sq", "als": "sq", "swa": "sw", "swh": "sw", "glg": "gl", "mar": "mr", "pan": "pa", "sin": "si",
    "khm": "km", "sna": "sn", "yor": "yo", "som": "so", "afr": "af", "oci": "oc", "kat": "ka", "geo": "ka",
    "bel": "be", "tgk": "tg", "snd": "sd", "guj": "gu", "amh": "am", "yid": "yi", "ydd": "yi", "lao": "lo",
    "uzb": "uz", "uzn": "uz", "fao": "fo", "hat": "ht", "pus": "ps", "pbt": "ps", "tuk": "tk", "nno": "nn",
    "mlt": "mt", "san": "sa", "ltz": "lb", "mya": "my", "bur": "my", "bod": "bo", "tib": "bo", "tgl": "tl",
    "mlg": "mg", "plt": "mg", "asm": "as", "tat": "tt", "lin": "ln", "hau": "ha", "bak": "ba", "jav": "jw",
    "sun": "su",
}
# fmt: on
NAMES: Mapping[str, str] = {**{english: code for code, english in LANGUAGES.items()}, **OTHER_NAMES}


def language_code(text: str) -> str:
    """Whisper's code for a code (``en``, ``eng``, ``en-US``, ``iw``) or an English name.

    Raises RequestError with the nearest names.
    """
    found = _known(text)
    if found is not None:
        return found
    near = difflib.get_close_matches(text.strip().lower(), [*NAMES, *LANGUAGES], n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; try a code such as 'en' or leave it out"
    raise RequestError(f"unknown language {text!r}{hint}", param="language")


def language_hint(text: str) -> str:
    """As ``language_code``, but a code that Whisper does not have comes back as it is, in lower case."""
    wanted = text.strip().lower()
    if _known(text) is None and TAG.fullmatch(wanted):
        return SEPARATORS.split(wanted)[0]
    return language_code(text)


def _known(text: str) -> str | None:
    wanted = text.strip().lower()
    if wanted in NAMES:
        return NAMES[wanted]
    base, *more = SEPARATORS.split(wanted)
    if base == "zh" and "yue" in more:  # BCP 47 allows the language as an extension of the macrolanguage
        return "yue"
    code = OTHER_CODES.get(base, base)
    return code if code in LANGUAGES and (not more or TAG.fullmatch(wanted)) else None
