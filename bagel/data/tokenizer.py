"""Text to ids and back: a released tokenizer from a local folder, or plain bytes for training from nothing."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from bagel.config import SAMPLE_DATA, ModelConfig
from shared.errors import UserError, opening

SHORT = 200  # characters of a text whose tokens are remembered
SPECIAL_STRINGS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the four marks."""

    bos: int
    eos: int
    start_of_image: int
    end_of_image: int

    @classmethod
    def from_names(cls, ids: dict[str, int]) -> "SpecialTokens":
        """From the mapping with the names of the released code."""
        return cls(ids["bos_token_id"], ids["eos_token_id"], ids["start_of_image"], ids["end_of_image"])


class Tokenizer(Protocol):
    """What the rest of the system asks of a tokenizer."""

    special: SpecialTokens
    vocab_size: int  # rows that an embedding needs
    identity: str  # another one when texts get other ids

    def encode(self, text: str) -> list[int]:
        """Ids without any mark; marks inside the text are read as plain text."""

    def decode(self, ids: list[int]) -> str:
        """The text without marks."""


class ByteTokenizer:
    """UTF-8 bytes 0..255, then the four marks: no file needed, every language possible."""

    special = SpecialTokens(256, 257, 258, 259)
    vocab_size = 260
    identity = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))  # half a surrogate pair, which JSON allows, becomes "?"

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")


class FolderTokenizer:
    """A tokenizer.json (or vocab.json, merges.txt) read by transformers offline; missing marks are added."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError(2, "no tokenizer", str(folder / "tokenizer.json"))
        with opening(f"tokenizer {folder}", "copy its files again, or give another folder with --tokenizer"):
            self.inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        known = set(self.inner.get_vocab())
        missing = [mark for mark in SPECIAL_STRINGS if mark not in known]
        if missing:
            self.inner.add_special_tokens({"additional_special_tokens": missing})
        ids = self.inner.get_vocab()
        self.special = SpecialTokens(*(int(ids[mark]) for mark in SPECIAL_STRINGS))
        self.vocab_size = len(self.inner)
        files = [path for path in (folder / name for name in TOKENIZER_FILES) if path.is_file()]
        self.identity = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
        self._short = lru_cache(4096)(self._encoded)  # questions and answers come again and again

    def encode(self, text: str) -> list[int]:
        return list(self._short(text)) if len(text) <= SHORT else self._encoded(text)

    def _encoded(self, text: str) -> list[int]:
        text = text.encode("utf-8", errors="replace").decode()  # half a pair becomes "?"
        return self.inner.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids, skip_special_tokens=True))


def tokenizer_folder(name: str) -> Path:
    """Where a tokenizer lies: `sample` is the shipped one, of bytes and the words of scenes."""
    return SAMPLE_DATA / "tokenizer" if name == "sample" else Path(name)


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The configured tokenizer; raises a UserError when it is too large for the embedding of a model trained from
    nothing.
    """
    name = config.tokenizer or config.model_path or config.llm_path
    if name is None:
        raise UserError("no tokenizer: give --model-path, or --tokenizer bytes or a folder with tokenizer.json")
    tokenizer = ByteTokenizer() if name == "bytes" else FolderTokenizer(tokenizer_folder(name))
    if config.from_scratch and tokenizer.vocab_size > config.language.vocab_size:
        raise UserError(
            f"model.language.vocab_size {config.language.vocab_size} is below the {tokenizer.vocab_size} ids of "
            f"tokenizer {name}; raise it"
        )
    return tokenizer
