"""Caption files as people have them: any encoding, any line ends, control characters in between."""

import codecs
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HIGH_RUNS = re.compile(rb"[\x80-\xff]+")
_KANA = re.compile("[\u3041-\u30fa]")
_NO_TEXT = {code: None for code in (*range(32), *range(0x7F, 0xA0), 0xFEFF, 0xFFFD) if not chr(code).isspace()}
_NO_TEXT |= dict.fromkeys(range(0xD800, 0xE000))  # halves of a sign, which JSON may hold and no file can

# The commonest signs beyond ASCII of texts in each encoding of one byte a sign: other encodings turn them into others.
_WESTERN = "éèàùâêîôûçñáíóúüöäßøåæãõ’‘“”–—…€«»"
_CYRILLIC = "оеаинтсрвлкм"
_OF_LATIN = (
    ("cp1252", _WESTERN + "ÉÀÈÇÖÜÄÅØÆÊÁ"),
    ("cp1250", "ąćęłńóśźżáčďéěíňřšťúůýžőű’„”"),
    ("cp1254", "ığşçöüİ’"),
    ("mac_roman", _WESTERN),
    ("iso8859-15", _WESTERN),
)
_OF_OTHERS = (
    ("cp1251", _CYRILLIC),
    ("cp1251", _CYRILLIC.upper()),
    ("koi8-r", _CYRILLIC),
    ("cp866", _CYRILLIC),
    ("cp1253", "αοιετσνυρπκλης"),
    ("cp1255", "יוהלאמרתבשעדנפחכ"),
    ("cp1256", "اليمونرتهبةعأفدسحى"),
)


def decode_text(data: bytes) -> tuple[str, str | None]:
    """(text, the encoding that was guessed, or None where a mark or UTF-8's own rules leave no doubt)."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding, errors="replace"), None  # a cut or damaged place costs its own sign
    if not _has_every_other_zero(data):
        try:
            return data.decode("utf-8"), None
        except UnicodeDecodeError:
            pass
    for encoding in _guesses(data):
        try:
            return data.decode(encoding, errors="replace" if encoding == "utf-8" else "strict"), encoding
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "latin-1"  # never fails


def _guesses(data: bytes) -> list[str]:
    """Encodings to try, the likeliest first, for bytes that are not UTF-8 throughout.

    Zeros are in UTF-16 alone. Where most signs are whole in UTF-8, it is that, damaged in places. One byte a sign: the
    right encoding shows the commonest letters of its languages. Two bytes a sign: Chinese of GB 2312 comes in pairs
    from 0xA1 on, Korean in pairs from 0xB0 to 0xC8 with spaces between words; Japanese shows kana.
    """
    if 0 in data and len(data) % 2 == 0:
        halves = ["utf-16-le", "utf-16-be"]
        return halves if data[1::2].count(0) > data[::2].count(0) else halves[::-1]
    runs = _HIGH_RUNS.findall(data)
    high = b"".join(runs)
    visible = len(data) - sum(data.count(space) for space in b" \t\r\n")
    is_paired = all(len(run) % 2 == 0 for run in runs) and min(high) >= 0xA1
    whole = b"".join(_HIGH_RUNS.findall(data.decode("utf-8", errors="ignore").encode()))
    if not is_paired and len(whole) > 0.8 * len(high):
        return ["utf-8"]
    latin, is_sure = _likeliest(high, _OF_LATIN, 0.999)
    if is_sure and len(high) <= 0.5 * visible:
        return [latin]
    other, is_likely = _likeliest(high, _OF_OTHERS, 0.65)
    has_one_byte_a_sign = is_likely and (not is_paired or min(high) >= 0xC0)
    if has_one_byte_a_sign and len(high) >= 6 and len(high) > 0.5 * visible:
        return [other]
    if is_paired:
        if len(runs) > 1 and len(high) >= 6 and all(0xB0 <= byte <= 0xC8 for byte in high[::2]):
            return ["cp949"]
        kana = sum(high[place] in (0xA4, 0xA5) for place in range(0, len(high), 2))
        return ["euc_jp", "gb18030"] if kana > 1 else ["gb18030"]
    try:
        if _KANA.search(data.decode("cp932")) and len(high) > 0.3 * visible:
            return ["cp932"]
    except UnicodeDecodeError:
        pass
    return ["big5", "gb18030", "cp949", latin] if len(high) > 0.4 * visible else [latin]


def _likeliest(high: bytes, tables: tuple[tuple[str, str], ...], share: float) -> tuple[str, bool]:
    """The encoding that turns most of the bytes into common letters, and whether they are at least this share; the
    first one where they are not.
    """
    counts = [sum(map(high.decode(name, errors="ignore").count, letters)) for name, letters in tables]
    is_sure = max(counts) >= share * len(high)
    return tables[counts.index(max(counts)) if is_sure else 0][0], is_sure


def _has_every_other_zero(data: bytes) -> bool:
    """Whether this is UTF-16 of mostly Latin letters without a mark."""
    pairs = len(data) // 2
    return pairs > 1 and len(data) % 2 == 0 and max(data[::2].count(0), data[1::2].count(0)) > 0.4 * pairs


def clean_captions(texts: Any) -> tuple[str, ...]:
    """Captions with white space joined and control characters gone; blank ones are left out, unless all are blank: then
    one empty caption remains, which stands for a picture that is to be trained without one.
    """
    texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
    lines = [" ".join(text.translate(_NO_TEXT).split()) for text in texts if isinstance(text, str)]
    return tuple(line for line in lines if line) or (("",) if lines else ())


class TextFiles:
    """Reads text files and notes which encodings had to be guessed."""

    def __init__(self) -> None:
        self.guessed: Counter[str] = Counter()
        self.first: str | None = None

    def read(self, path: Path) -> str:
        """The text of a file; line ends are made \\n."""
        return self.decode(path.read_bytes(), str(path))

    def decode(self, data: bytes, name: str) -> str:
        """The same for bytes that are at hand."""
        text, encoding = decode_text(data)
        if encoding is not None:
            self.guessed[encoding] += 1
            self.first = self.first or name
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def captions(self, path: Path) -> tuple[str, ...]:
        """One caption a line."""
        return clean_captions(self.read(path).split("\n"))

    def warn(self, say: Callable[[str], None]) -> None:
        """One sentence on the guesses, if there were any."""
        if self.guessed:
            kinds = ", ".join(f"{encoding} ({count})" for encoding, count in self.guessed.most_common())
            say(
                f"warning: {sum(self.guessed.values())} text files are not UTF-8 and were read as {kinds}, the first: "
                f"{self.first}; look at the captions in samples/inputs.txt, and save the files as UTF-8"
            )
