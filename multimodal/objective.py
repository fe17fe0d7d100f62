"""The three stages as modules: everything that needs trained weights happens in their forward.

Stage 1 PretrainModel: masked autoencoding of pictures and spectrograms (He et al. 2021), masked words on request.
Stage 2 AlignModel: embeddings for the contrastive losses.
Stage 3 FinetuneModel: the same, with matching and classification.

Legend: B batch, N patches, K kept patches, D width, P values of a patch, L text tokens, E embedding.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from multimodal.data.text import MASK, SEP, SPECIAL_TOKENS
from multimodal.model import AUDIO_PATCH, MultimodalModel, sinusoids
from multimodal.modules.blocks import Tower, small_normal_

DECODERS = {"mini": (192, 2), "tiny": (256, 4), "small": (256, 4), "base": (384, 4), "large": (512, 4)}  # width, depth
IMAGE_MASKED, AUDIO_MASKED, WORDS_MASKED = 0.75, 0.80, 0.15
MODALITY_DROPOUT, TEXT_DROPOUT = 0.1, 0.5
Part = dict[str, Tensor]


# --- stage 1 ----------------------------------------------------------------------------------------------------------


def sincos_2d(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """(rows * columns, width) fixed positions: a quarter each of sine and cosine of the row and of the column."""
    row, column = (sinusoids(count, width // 2, device) for count in (rows, columns))
    return torch.cat([row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], -1).flatten(0, 1)


def split_by_mask(draws_BN: Tensor, masked: float) -> tuple[Tensor, Tensor, Tensor]:
    """keep (B, K) patch indices, restore (B, N) that undoes the shuffle, and hidden (B, N) bool, from uniform draws."""
    kept = max(1, round(draws_BN.shape[1] * (1 - masked)))
    order = draws_BN.argsort(1)
    restore = order.argsort(1)
    return order[:, :kept], restore, restore >= kept


class MaskedDecoder(nn.Module):
    """Predicts the hidden patches from the tokens of the kept ones."""

    def __init__(self, encoder_width: int, width: int, depth: int, patch_values: int):
        super().__init__()
        self.enter = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.tower = Tower(width, depth)
        self.predict = nn.Linear(width, patch_values)
        nn.init.normal_(self.mask_token, std=0.02)
        self.tower.initialise()
        small_normal_(self.enter)
        small_normal_(self.predict)

    def forward(self, tokens_BKD: Tensor, restore_BN: Tensor, rows: int, columns: int) -> Tensor:
        """tokens_BKD: class token first. Returns (B, N, P)."""
        tokens = self.enter(tokens_BKD)
        hidden = restore_BN.shape[1] - (tokens.shape[1] - 1)
        patches = torch.cat([tokens[:, 1:], self.mask_token.to(tokens.dtype).expand(len(tokens), hidden, -1)], 1)
        patches = patches.gather(1, restore_BN.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        patches = patches + sincos_2d(rows, columns, patches.shape[-1], patches.device)
        return self.predict(self.tower(torch.cat([tokens[:, :1], patches], 1))[:, 1:])


def masked_loss(predicted_BNP: Tensor, patches_BNP: Tensor, hidden_BN: Tensor) -> Tensor:
    """Mean squared error over hidden patches, each target patch normalised by its own mean and variance. fp32."""
    patches = patches_BNP.float()
    variance, mean = torch.var_mean(patches, -1, keepdim=True, unbiased=False)
    error = (predicted_BNP.float() - (patches - mean) / (variance + 1e-6).sqrt()).square().mean(-1)
    return (error * hidden_BN).sum() / hidden_BN.sum()


class MaskedWords(nn.Module):
    """Predicts masked tokens; the output is tied to the word table."""

    def __init__(self, width: int, word_width: int, vocabulary: int):
        super().__init__()
        self.project = nn.Linear(width, word_width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        small_normal_(self.project)

    def forward(self, tokens_BLD: Tensor, words: Tensor) -> Tensor:
        """(B, L, vocabulary)."""
        return self.project(tokens_BLD) @ words.T + self.bias


def mask_words(ids_BL: Tensor, draws_B3L: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """BERT's rule: 15 % of the tokens become targets; 80 % of them [MASK], 10 % a random token, 10 % stay."""
    chosen, action, other = draws_B3L[:, :, : ids_BL.shape[1]].unbind(1)
    chosen = (chosen < WORDS_MASKED) & ((ids_BL >= SPECIAL_TOKENS) | (ids_BL == SEP))
    random_ids = SPECIAL_TOKENS + (other * (vocabulary - SPECIAL_TOKENS)).long()
    shown = torch.where(action < 0.8, MASK, torch.where(action < 0.9, random_ids, ids_BL))
    return torch.where(chosen, shown, ids_BL), chosen


class StageModule(nn.Module):
    """What the stages have in common: the network that they train."""

    def __init__(self, network: MultimodalModel):
        super().__init__()
        self.network = network


class PretrainModel(StageModule):
    """Stage 1. One loss for each kind of data; both kinds run in every step."""

    def __init__(self, network: MultimodalModel, *, masked_words: bool = False):
        super().__init__(network)
        width, depth = DECODERS.get(network.config["size"], (256, 4))
        patch = network.image_patch
        self.image_decoder = MaskedDecoder(network.image_tower.width, width, depth, 3 * patch**2)
        self.audio_decoder = MaskedDecoder(network.audio_tower.width, width, depth, AUDIO_PATCH**2)
        self.masked_words = (
            MaskedWords(network.text_tower.width, network.words.embedding_dim, network.config["vocabulary"])
            if masked_words
            else None
        )

    def forward(self, batch: dict[str, Part], draws: dict[str, Part]) -> Part:
        """batch: image {images}, audio {audio, audio_mask}, text {input_ids, attention_mask}.

        draws: uniform numbers by name. Returns the loss of each part, shape ().
        """
        found = {}
        if "image" in batch:
            found["image"] = self._image(batch["image"]["images"], draws["image"]["patches"])
        if "audio" in batch:
            found["audio"] = self._audio(
                batch["audio"]["audio"], batch["audio"].get("audio_mask"), draws["audio"]["patches"]
            )
        if "text" in batch:
            found["text"] = self._words(
                batch["text"]["input_ids"], batch["text"]["attention_mask"], draws["text"]["words"]
            )
        return found

    def _image(self, images: Tensor, draws_BN: Tensor) -> Tensor:
        patch = self.network.image_patch
        patches = rearrange(images, "B c (h p) (w q) -> B (h w) (p q c)", p=patch, q=patch)
        keep, restore, hidden = split_by_mask(draws_BN, IMAGE_MASKED)
        tokens = self.network.image_tokens(images, keep)  # the encoder sees a quarter of the patches, and costs so much
        rows, columns = images.shape[2] // patch, images.shape[3] // patch
        return masked_loss(self.image_decoder(tokens, restore, rows, columns), patches, hidden)

    def _audio(self, audio: Tensor, audio_mask: Tensor | None, draws_BN: Tensor) -> Tensor:
        patches = rearrange(audio, "B (t p) (f q) -> B (t f) (p q)", p=AUDIO_PATCH, q=AUDIO_PATCH)
        keep, restore, hidden = split_by_mask(draws_BN, AUDIO_MASKED)
        tokens, _ = self.network.audio_tokens(audio, audio_mask, keep)
        return masked_loss(
            self.audio_decoder(tokens, restore, audio.shape[1] // AUDIO_PATCH, audio.shape[2] // AUDIO_PATCH),
            patches,
            hidden,
        )

    def _words(self, ids: Tensor, mask: Tensor, draws: Tensor) -> Tensor:
        assert self.masked_words is not None, "the stage was made without masked words"
        shown, chosen = mask_words(ids, draws, self.network.config["vocabulary"])
        logits = self.masked_words(self.network.text_tokens(shown, mask), self.network.words.weight)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")
        return (loss * chosen.flatten()).sum() / chosen.sum().clamp_min(1)


# --- stages 2 and 3 ---------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What the towers made of one part of a batch, by modality."""

    tokens: dict[str, Tensor]
    masks: dict[str, Tensor | None]


class AlignModel(StageModule):
    """Stage 2: unit embeddings of every part of a batch, and the temperatures.

    image_keep, audio_keep: share of the patches that the encoders see while training (Li et al. 2023, FLIP).
    """

    first_only = True  # nothing but the first token of each tower is read

    def __init__(self, network: MultimodalModel, *, image_keep: float = 1.0, audio_keep: float = 1.0):
        super().__init__(network)
        self.image_keep, self.audio_keep = image_keep, audio_keep

    def forward(
        self, batch: dict[str, Part], draws: dict[str, Part] | None = None, embeddings_only: bool = True
    ) -> Part:
        """batch: image {images, input_ids, attention_mask}, audio {audio, audio_mask, input_ids, ...}, voice {images,
        audio}; every field may be absent. draws: uniform numbers for training, None for evaluation.

        Returns image_embeds, imagetext_embeds, audio_embeds, audiotext_embeds, voice_embeds, frame_embeds (B, E).
        """
        found, _ = self._encode(batch, draws)
        return found

    def _encode(self, batch: dict[str, Part], draws: dict[str, Part] | None) -> tuple[Part, dict[str, Encoded]]:
        """Embeddings, and the tokens and masks by part."""
        network = self.network
        tokens: dict[str, dict[str, Tensor]] = {part: {} for part in batch}
        paths: dict[str, dict[str, Tensor | None]] = {part: {} for part in batch}
        masks: dict[str, dict[str, Tensor | None]] = {part: {} for part in batch}
        for part, inputs in batch.items():
            keep = {} if draws is None or part not in draws else draws[part]
            if "images" in inputs:
                tokens[part]["image"] = network.image_tokens(
                    inputs["images"],
                    self._keep(keep.get("patches"), self.image_keep, part == "image"),
                    first_only=self.first_only,
                )
                paths[part]["image"] = network.image_path(inputs["images"])
            if "audio" in inputs:
                paths[part]["audio"] = network.audio_path(inputs["audio"], inputs.get("audio_mask"))
                tokens[part]["audio"], masks[part]["audio"] = network.audio_tokens(
                    inputs["audio"],
                    inputs.get("audio_mask"),
                    self._keep(keep.get("patches"), self.audio_keep, part == "audio"),
                    first_only=self.first_only,
                )
        self._encode_texts(batch, tokens, masks, paths)
        names = {
            ("image", "image"): "image",
            ("image", "text"): "imagetext",
            ("audio", "audio"): "audio",
            ("audio", "text"): "audiotext",
            ("voice", "audio"): "voice",
            ("voice", "image"): "frame",
        }
        found: Part = {}
        for part, own in tokens.items():
            for name, value in own.items():
                found[f"{names[part, name]}_embeds"] = network.embedding(name, value, paths[part][name])
        found |= network.scales()
        return found, {part: Encoded(tokens[part], masks[part]) for part in batch}

    def _keep(self, draws_BN: Tensor | None, share: float, wanted: bool) -> Tensor | None:
        return split_by_mask(draws_BN, 1 - share)[0] if wanted and share < 1 and draws_BN is not None else None

    def _encode_texts(self, batch: dict[str, Part], tokens: dict, masks: dict, paths: dict) -> None:
        """All captions of a step go through the text tower together."""
        parts = [part for part in batch if "input_ids" in batch[part]]
        if not parts:
            return
        length = max(batch[part]["input_ids"].shape[1] for part in parts)

        def padded(name: str) -> Tensor:
            return torch.cat(
                [functional.pad(batch[part][name], (0, length - batch[part][name].shape[1])) for part in parts]
            )

        mask = padded("attention_mask")
        sizes = [len(batch[part]["input_ids"]) for part in parts]
        encoded = self.network.text_tokens(padded("input_ids"), mask, first_only=self.first_only).split(sizes)
        for part, value, own in zip(parts, encoded, mask.split(sizes), strict=True):
            tokens[part]["text"], masks[part]["text"] = value, own
            width = batch[part]["input_ids"].shape[1]
            paths[part]["text"] = self.network.text_path(batch[part]["input_ids"], own[:, :width])


class FinetuneModel(AlignModel):
    """Stage 3: the embeddings, matching of true and of hard wrong pairs, and classification."""

    first_only = False

    def forward(
        self, batch: dict[str, Part], draws: dict[str, Part] | None = None, embeddings_only: bool = False
    ) -> Part:
        """Adds image_match, audio_match (3B,) with *_match_target and *_match_weight, and class_logits (B, classes).

        embeddings_only: as AlignModel, for the gradient cache's first pass, which needs nothing else.
        """
        found, parts = self._encode(batch, draws)
        if embeddings_only:
            return found
        # Do these two belong together? Asked of each pair, and of the wrong partners that look most alike.
        for part, scale in (("image", "logit_scale"), ("audio", "audio_logit_scale")):
            if draws is not None and part in batch and len(parts[part].tokens) == 2:
                own, text = found[f"{part}_embeds"], found[f"{part}text_embeds"]
                found |= self._match(
                    part, parts[part], own, text, found[scale], batch[part]["keys"], draws[part]["pairs"]
                )
        # Which classes? From the fused tokens; the text is hidden half of the time, so that a picture alone will do.
        if "image" in batch and "images" in batch["image"] and "labels" in batch["image"]:
            found["class_logits"] = self._classify(parts["image"], None if draws is None else draws["image"]["pairs"])
        if "voice" in batch and "labels" in batch["voice"]:
            voice = parts["voice"]
            found["class_logits"] = self.network.classifier(self.network.fuse(voice.tokens, voice.masks)).float()
        return found

    def _match(
        self, part: str, encoded: Encoded, own: Tensor, text: Tensor, scale: Tensor, keys: Tensor, draws: Tensor
    ) -> Part:
        wrong_text, valid_text = hard_negatives(own, text, scale, keys, draws[:, 0])
        wrong_own, valid_own = hard_negatives(text, own, scale, keys, draws[:, 1])
        everyone = torch.arange(len(own), device=own.device)
        rows = {part: torch.cat([everyone, everyone, wrong_own]), "text": torch.cat([everyone, wrong_text, everyone])}
        tokens = {name: take_rows(value, rows[name]) for name, value in encoded.tokens.items()}
        masks = {name: None if mask is None else mask[rows[name]] for name, mask in encoded.masks.items()}
        logits = self.network.match_head(self.network.fuse(tokens, masks)).squeeze(-1).float()
        true = torch.ones_like(valid_text, dtype=torch.float32) * (len(own) > 1)  # one pair alone teaches nothing
        return {
            f"{part}_match": logits,
            f"{part}_match_target": torch.cat([true, 0 * true, 0 * true]),
            f"{part}_match_weight": torch.cat([true, valid_text.float(), valid_own.float()]),
        }

    def _classify(self, encoded: Encoded, draws: Tensor | None) -> Tensor:
        """Pictures with their text hidden half of the time; each modality hidden with probability 0.1, never both."""
        tokens, hidden = encoded.tokens, None
        if draws is None or "text" not in tokens:
            tokens = {"image": tokens["image"]}
        else:
            no_text = (draws[:, 2] < TEXT_DROPOUT) | (draws[:, 3] < MODALITY_DROPOUT)
            hidden = {"text": ~no_text, "image": no_text | (draws[:, 4] >= MODALITY_DROPOUT)}
        return self.network.classifier(self.network.fuse(tokens, encoded.masks, hidden)).float()


class _TakeRows(torch.autograd.Function):
    """value[rows] whose gradient is a sum in a fixed order.

    The gradient of plain indexing adds rows that were taken twice in the order in which threads, or a GPU's blocks,
    happen to come: the same run twice would end with other weights.
    """

    @staticmethod
    def forward(context, value: Tensor, rows: Tensor) -> Tensor:
        context.save_for_backward(rows)
        context.count = len(value)
        return value.index_select(0, rows)

    @staticmethod
    def backward(context, *gradients: Tensor) -> tuple[Tensor, None]:
        (rows,), gradient = context.saved_tensors, gradients[0]
        chosen = functional.one_hot(rows, context.count).to(gradient.dtype).T  # a product has one order of its own
        return (chosen @ gradient.flatten(1)).view(context.count, *gradient.shape[1:]), None


def take_rows(value: Tensor, rows: Tensor) -> Tensor:
    """value[rows] along the first axis, in which rows may occur several times."""
    return _TakeRows.apply(value, rows)


@torch.no_grad()
def hard_negatives(own: Tensor, other: Tensor, scale: Tensor, keys: Tensor, draws_B: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `own` the index of a wrong partner, drawn with probability softmax of the similarities, and
    whether there is one.

    The true partner and duplicates of it are excluded. draws_B: uniform in [0, 1).
    """
    with torch.autocast(own.device.type, enabled=False):  # bf16 would make near partners equal
        scores = scale.float() * own.float() @ other.float().T
    same = (keys[:, None] == keys[None]).any(-1)
    valid = ~same.all(1)
    chances = scores.masked_fill(same, float("-inf")).softmax(1).nan_to_num(0.0)
    chosen = (chances.cumsum(1) <= draws_B[:, None] * chances.sum(1, keepdim=True)).sum(1)
    last = (~same).long().mul(torch.arange(len(own), device=own.device)).argmax(1)  # rounding may step past the end
    return torch.minimum(chosen, last), valid
