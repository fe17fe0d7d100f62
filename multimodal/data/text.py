"""The tokenizer (byte-level BPE of 16,384 tokens) and the loading of GloVe vectors into the word table.

Legend: B texts, L tokens.
"""

import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from shared.errors import UserError

DEFAULT_FILE = Path(__file__).parent / "tokenizer" / "tokenizer_bpe16k.json"
PAD, CLS, SEP, MASK, UNKNOWN = 0, 1, 2, 3, 4
SPECIAL_TOKENS = 5
MULTIPLE = 8  # batches are padded to a multiple of this
WORD_END = "</w>"


class TextTokenizer:
    """Texts to ids: [CLS] ... [SEP], cut to max_length with [SEP] kept last."""

    def __init__(self, path: Path | str | None = None, max_length: int = 64):
        self.path, self.max_length = Path(path) if path else DEFAULT_FILE, max_length
        try:
            data = self.path.read_bytes()
            self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"--tokenizer {self.path}: no such file; leave it out for the one that ships here"
            ) from None
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"--tokenizer {self.path}: not a tokenizers JSON file ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # a caption that says [PAD] is text, not padding
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocabulary = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        ids = self._tokenizer.encode(text).ids
        if len(ids) > self.max_length:
            ids = ids[: self.max_length - 1] + [SEP]
        return ids

    def tokens(self, text: str) -> list[str]:
        """Token strings of one text, not cut."""
        return self._tokenizer.encode(text).tokens

    def token_of(self, index: int) -> str:
        """The string of a token id; empty for an id that is none."""
        return self._tokenizer.id_to_token(index) or ""

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens are left out, and nothing gives the empty string."""
        plain = [index for index in ids if index >= SPECIAL_TOKENS]
        return self._tokenizer.decode(plain).rstrip() if plain else ""

    def batch(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask, int64 and bool (B, L), L a multiple of 8."""
        return pad_ids([self.encode(text) for text in texts])


def pad_ids(ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad to the longest, rounded up to a multiple of 8."""
    longest = max(map(len, ids))
    padded = torch.full((len(ids), longest + -longest % MULTIPLE), PAD)
    for row, values in enumerate(ids):
        padded[row, : len(values)] = torch.tensor(values)
    return padded, padded != PAD


def find_glove(folder: Path | None, width: int) -> Path | None:
    """The GloVe file of that width under `folder`, or None."""
    name = f"glove.6B.{width}d.txt"
    places = [folder / name, folder / "glove" / name] if folder else []
    return next((path for path in places if path.exists()), None)


@torch.no_grad()
def load_word_vectors(
    table: torch.nn.Embedding, tokenizer: TextTokenizer, path: Path, generator: torch.Generator
) -> float:
    """Put GloVe rows into the word table for tokens that are whole words; returns the share of tokens covered.

    Other rows are normal with the mean and std of the loaded ones; [PAD] is zero. File: `word v1 ... vd` a line.
    """
    wanted = {
        token.removesuffix(WORD_END): index
        for token, index in tokenizer._tokenizer.get_vocab().items()
        if token.endswith(WORD_END) and index >= SPECIAL_TOKENS
    }
    width, rows = table.embedding_dim, {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            word, *values = line.rstrip().split(" ")
            if word not in wanted:
                continue
            if len(values) != width:
                raise UserError(
                    f"{path}: line {number} has {len(values)} numbers, this model's word vectors have {width}; "
                    f"use glove.6B.{width}d.txt"
                )
            try:
                rows[wanted[word]] = torch.tensor([float(value) for value in values])
            except ValueError:
                raise UserError(
                    f"{path}: line {number} holds something that is not a number; download the file again"
                ) from None
    if not rows:
        raise UserError(f"{path}: holds no word of the tokenizer; a GloVe text file (word v1 ... v{width}) is wanted")
    known = torch.stack(list(rows.values()))
    mean, std = known.mean(0), known.std(0) if len(known) > 1 else torch.zeros(width)
    table.weight.copy_(mean + std * torch.randn(table.weight.shape, generator=generator))
    table.weight[list(rows)] = known
    table.weight[PAD] = 0
    return len(rows) / table.num_embeddings
