"""Captions to token states: the frozen CLIP text tower, or hashed byte n-grams where no weights are at hand.

Shapes: B captions, T tokens, E width of a text state.
"""

import math
import re
import unicodedata
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dit.config import Config
from shared.data import sent
from shared.engine.products import use_fast_products
from shared.errors import UserError, load_whole, opening


class TextCondition(NamedTuple):
    """What a caption becomes: states (B, T, E), mask (B, T) True at real tokens, pooled (B, E); float32."""

    states: Tensor
    mask: Tensor
    pooled: Tensor


class CaptionEncoder(nn.Module):
    """What every text encoder offers."""

    width: int  # E
    length: int  # T
    has_tokens = False  # whether tokenize and encode_ids are there, so that loader processes can tokenize

    def encode(self, captions: list[str]) -> TextCondition:
        """Condition of every caption."""
        raise NotImplementedError

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, T), int64."""
        raise NotImplementedError

    def encode_ids(self, ids_BT: Tensor) -> TextCondition:
        """Condition of token ids."""
        raise NotImplementedError

    def is_cut(self, captions: list[str]) -> list[bool]:
        """Whether a caption is longer than what is read of it."""
        raise NotImplementedError


def warn_of_cut(encoder: CaptionEncoder, captions: list[str], say: Callable[[str], None]) -> None:
    """One sentence on captions that are longer than the model reads."""
    cut = encoder.is_cut(captions)
    if any(cut):
        say(
            f"warning: {sum(cut)} of {len(cut)} captions have more than the {encoder.length} tokens that are read "
            f"(model.text_len); what follows is cut off, first in: {captions[cut.index(True)][:120]!r}"
        )


class TextEncoder(CaptionEncoder):
    """CLIP's text tower, frozen. States follow the final layer norm; pooled is that of the first end-of-text token."""

    has_tokens = True

    def __init__(
        self,
        pretrained_model_name: str = "openai/clip-vit-base-patch32",
        *,
        length: int = 77,
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        from transformers import CLIPTextModel, CLIPTokenizer

        with _loading(pretrained_model_name):
            self.tokenizer = CLIPTokenizer.from_pretrained(pretrained_model_name, local_files_only=local_files_only)
            self.model = load_whole(CLIPTextModel, pretrained_model_name, local_files_only=local_files_only)
        self._freeze(length)
        places = self.model.config.max_position_embeddings
        if length > places:
            raise UserError(
                f"model.text_len {length}: this CLIP reads {places} tokens at most; set --text-len {places}, or use "
                "--set text.type=language with a T5, Gemma or Qwen"
            )

    @classmethod
    def of_model(cls, model: nn.Module, *, name: str, length: int) -> "TextEncoder":
        """One around a CLIPTextModel that is loaded already; its tokenizer comes from where the model came from, or
        from `name`.
        """
        from transformers import CLIPTextModel, CLIPTokenizer

        if not isinstance(model, CLIPTextModel):
            raise UserError(f"text_encoder is {type(model).__name__}; a CLIPTextModel or a CaptionEncoder is wanted")
        made = cls.__new__(cls)
        CaptionEncoder.__init__(made)
        place = model.config.name_or_path or name
        with _loading(place):
            made.tokenizer, made.model = CLIPTokenizer.from_pretrained(place), model
        made._freeze(length)
        return made

    def _freeze(self, length: int) -> None:
        config = self.model.config
        self.length, self.width = length, getattr(config, "hidden_size", None) or config.encoder.hidden_size
        self.model.requires_grad_(False).eval()
        use_fast_products(self.model)

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stays in eval mode: it is frozen."""
        return super().train(False)

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, T), int64, cut or padded to the length."""
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def is_cut(self, captions: list[str]) -> list[bool]:
        """Whether a caption has more tokens than are read."""
        return [len(ids) > self.length for ids in self.tokenizer(captions, verbose=False)["input_ids"]]

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> TextCondition:
        """Condition of every caption, on the encoder's device."""
        return self.encode_ids(self.tokenize(captions)["input_ids"])

    @torch.inference_mode()
    def encode_ids(self, ids_BT: Tensor) -> TextCondition:
        """Condition of token ids. Attention is causal, so padding does not change the states of real tokens."""
        ids_BT = ids_BT.to(self.model.device)
        states = self.model(input_ids=ids_BT).last_hidden_state.float()
        first_end = (ids_BT == self.tokenizer.eos_token_id).int().argmax(1)
        mask = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None] <= first_end[:, None]
        return TextCondition(states, mask, states[torch.arange(len(ids_BT), device=ids_BT.device), first_end])


class LanguageEncoder(TextEncoder):
    """A text model of transformers by path, frozen: the encoder of T5, UMT5 and T5Gemma, or a decoder such as Gemma or
    Qwen read up to its last layer. A pipeline's folder will do, with its tokenizer/ and text_encoder/. Pooled is the
    mean over real tokens.
    """

    has_tokens = False  # a batch of ids without its mask would not do: other models' padding may be any token

    def __init__(self, pretrained_model_name: str, *, length: int, local_files_only: bool = False) -> None:
        CaptionEncoder.__init__(self)
        import transformers

        place, is_pipeline = pretrained_model_name, (Path(pretrained_model_name) / "text_encoder").is_dir()
        given: dict[str, Any] = {"local_files_only": local_files_only}
        with _loading(pretrained_model_name):
            folder = {"subfolder": "tokenizer"} if is_pipeline else {}
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                place, padding_side="right", **given, **folder
            )
            given |= {"subfolder": "text_encoder"} if is_pipeline else {}
            kind = transformers.AutoConfig.from_pretrained(place, **given).model_type
            self.model: Any = load_whole(encoder_class(kind), place, **given)
        if getattr(self.model, "language_model", None) is not None:  # the text part of a model that also sees
            self.model = self.model.language_model
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._freeze(length)

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> TextCondition:
        """Condition of every caption, on the encoder's device. The empty caption keeps one token."""
        tokens = {name: value.to(self.model.device) for name, value in self.tokenize(captions).items()}
        mask = tokens["attention_mask"].bool()
        mask[:, 0] |= ~mask.any(1)
        states = self.model(input_ids=tokens["input_ids"], attention_mask=mask.long()).last_hidden_state.float()
        weight = mask.float()[..., None]
        return TextCondition(states, mask, (states * weight).sum(1) / weight.sum(1))


def encoder_class(kind: str) -> Any:
    """The class of transformers that reads text of a model_type."""
    import transformers
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    kinds: dict[str, Any] = {
        "clip": transformers.CLIPTextModel,
        "clip_text_model": transformers.CLIPTextModel,
        "t5": transformers.T5EncoderModel,
        "umt5": transformers.UMT5EncoderModel,
        "t5gemma": transformers.T5GemmaEncoderModel,
        "t5_gemma_module": T5GemmaEncoder,  # as PRX keeps it
    }
    return kinds.get(kind, transformers.AutoModel)


def _loading(name: str) -> AbstractContextManager[None]:
    remedy = "give a local folder with --text-encoder-path, or use --set text.type=hash, which needs no weights"
    return opening(f"text.pretrained_model_name {name}", remedy)


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+|[#*+&%]")


NEIGHBOURS, NEIGHBOUR_WEIGHT = 4, 0.7  # "to the left of" is four words


class HashTextEncoder(CaptionEncoder):
    """Words as fixed vectors: sums of random vectors of the word and its byte 3- and 4-grams (Bojanowski et al. 2017).

    Nothing is trained and nothing is stored: a vector follows from the bytes alone, so the same caption gives the same
    states on any machine. Related spellings get related vectors; the model's own text projection learns what they mean.
    With `context` every state also carries a trace of its neighbours, so that "a left of b" differs from "b left of a".
    """

    def __init__(self, *, width: int = 128, length: int = 24, context: bool = False) -> None:
        super().__init__()
        self.width, self.length, self.context = width, length, context
        self._words: dict[str, np.ndarray] = {}

    def encode(self, captions: list[str]) -> TextCondition:
        """Condition of every caption, on the CPU. The pooled vector is the scaled mean of the words."""
        states = np.zeros((len(captions), self.length, self.width), dtype=np.float32)
        mask = np.zeros((len(captions), self.length), dtype=bool)
        pooled = np.zeros((len(captions), self.width), dtype=np.float32)
        for row, caption in enumerate(captions):
            words = [*self.words(caption)[: self.length - 1], "</s>"]  # the end mark also stands for the empty caption
            vectors = np.stack([self._vector(word) for word in words])
            states[row, : len(words)] = _with_context(vectors) if self.context else vectors
            mask[row, : len(words)] = True
            pooled[row] = vectors.sum(0) / math.sqrt(len(words))
        return TextCondition(torch.from_numpy(states), torch.from_numpy(mask), torch.from_numpy(pooled))

    def is_cut(self, captions: list[str]) -> list[bool]:
        """Whether a caption has more words than are read."""
        return [len(self.words(caption)) > self.length - 1 for caption in captions]

    @staticmethod
    def words(caption: str) -> list[str]:
        """Lower-case words; each Chinese, Japanese or Korean sign is a word."""
        return _WORD.findall(unicodedata.normalize("NFKC", caption).lower())

    def _vector(self, word: str) -> np.ndarray:
        if word not in self._words:
            text = b"<" + word.encode() + b">"
            grams = [text[start : start + size] for size in (3, 4) for start in range(len(text) - size + 1)]
            total = self._gram(text) + sum((self._gram(gram) for gram in grams), np.zeros(self.width)) / math.sqrt(
                max(len(grams), 1)
            )
            self._words[word] = (total * math.sqrt(self.width) / np.linalg.norm(total)).astype(np.float32)
        return self._words[word]

    def _gram(self, gram: bytes) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(zlib.crc32(gram))).standard_normal(self.width)


def _with_context(vectors_TE: np.ndarray) -> np.ndarray:
    """Add the vectors of the neighbours, weaker with distance: of those before turned by one place, of those after by
    one place the other way, so that before and after differ.
    """
    states_TE = vectors_TE.copy()
    for distance in range(1, min(NEIGHBOURS + 1, len(vectors_TE))):
        weight = NEIGHBOUR_WEIGHT**distance
        states_TE[distance:] += weight * np.roll(vectors_TE[:-distance], 1, axis=1)
        states_TE[:-distance] += weight * np.roll(vectors_TE[distance:], -1, axis=1)
    return states_TE


def make_text_encoder(config: Config) -> CaptionEncoder | None:
    """The encoder that the settings name; None for a model that reads no text. Refuses a width that does not fit."""
    text, model = config.text, config.model
    if model.text_conditioning == "none":
        return None
    if text.type == "hash":
        return HashTextEncoder(width=model.text_dim, length=model.text_len, context=text.context)
    kind = TextEncoder if text.type == "clip" else LanguageEncoder
    encoder = kind(text.pretrained_model_name, length=model.text_len, local_files_only=text.local_files_only)
    if encoder.width != model.text_dim:
        raise UserError(
            f"text.pretrained_model_name {text.pretrained_model_name} has states of width {encoder.width}, "
            f"model.text_dim is {model.text_dim}; set --set model.text_dim={encoder.width}"
        )
    return encoder


def condition_of(
    texts: list[str], labels: Tensor | None, encoder: CaptionEncoder | None, device: torch.device
) -> dict[str, Tensor]:
    """The keyword arguments of the model that carry captions or labels."""
    if encoder is None:
        return {} if labels is None else {"labels": labels.to(device)}
    # encoders answer with inference tensors, which autograd refuses to save: the copies are ordinary ones
    states, mask, pooled = (sent(part, device) for part in encoder.encode(texts))
    return {"text_embeddings": states.clone(), "text_mask": mask.clone(), "text_pooled": pooled.clone()}
