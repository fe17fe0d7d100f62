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
_NO_TEXT = {code: None for code in (*range(32), *range(0x7F, 0xA0), 0xFEFF) if not chr(code).isspace()}


def decode_text(data: bytes) -> tuple[str, str | None]:
    """(text, the encoding that was guessed, or None where a mark or UTF-8's own rules leave no doubt)."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding), None
            except UnicodeDecodeError:
                break
    if not _has_every_other_zero(data):
        try:
            return data.decode("utf-8"), None
        except UnicodeDecodeError:
            pass
    for encoding in _guesses(data):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "latin-1"  # never fails


def _guesses(data: bytes) -> list[str]:
    """Encodings to try, the likeliest first.

    One byte a sign: accents and quotes stand alone between ASCII letters; Cyrillic fills the range from 0xC0. Two bytes
    a sign: Chinese of GB 2312 comes in pairs from 0xA1 on; Japanese shows kana.
    """
    if _has_every_other_zero(data):
        return ["utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"]
    runs = _HIGH_RUNS.findall(data)
    high = b"".join(runs)
    visible = len(data) - sum(data.count(space) for space in b" \t\r\n")
    if len(high) >= 6 and len(high) > 0.5 * visible and all(byte >= 0xC0 or byte in (0xA8, 0xB8) for byte in high):
        return ["cp1251"]
    if all(len(run) % 2 == 0 for run in runs) and min(high) >= 0xA1:
        kana = sum(high[place] in (0xA4, 0xA5) for place in range(0, len(high), 2))
        return ["euc_jp", "gb18030"] if kana > 1 else ["gb18030"]
    try:
        if _KANA.search(data.decode("cp932")) and len(high) > 0.3 * visible:
            return ["cp932"]
    except UnicodeDecodeError:
        pass
    return ["big5", "gb18030", "cp949", "cp1252"] if len(high) > 0.4 * visible else ["cp1252"]


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
