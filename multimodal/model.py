"""The network: one transformer tower each for pictures, text and sound, and a fusion tower over any of their tokens.

Legend: B batch, C channels, H W pixels, L text tokens, T frames of 10 ms, N tokens of a tower, D its width,
E embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from multimodal.modules.blocks import Tower, small_normal_
from shared.engine.products import linear, use_fast_products

VOCABULARY = 16384
PAD, MASK_TOKEN = 0, 3  # ids up to this one stand for no word
MODALITIES = ("image", "text", "audio")
MAX_TEXT = 77
MEL_BANDS, AUDIO_PATCH = 80, 16
AUDIO_BANDS = MEL_BANDS // AUDIO_PATCH
POSITIVE_RATE = 0.036  # about 2.9 of 80 classes per COCO picture: the classifier starts at this probability


@dataclass(frozen=True)
class Widths:
    """(width, depth) of each tower, and the width of the word table. Heads are 64 wide."""

    image: tuple[int, int]
    text: tuple[int, int]
    audio: tuple[int, int]
    fusion: tuple[int, int]
    word: int


SIZES = {
    "mini": Widths((192, 4), (192, 3), (192, 4), (192, 1), 100),
    "tiny": Widths((192, 12), (192, 4), (192, 8), (256, 2), 100),
    "small": Widths((320, 12), (320, 5), (320, 6), (320, 2), 200),
    "base": Widths((512, 12), (512, 4), (512, 5), (512, 2), 300),
    "large": Widths((768, 12), (768, 5), (768, 7), (768, 3), 300),
}


def create_model(size: str = "base", num_classes: int = 80, **settings: Any) -> "MultimodalModel":
    """The model of a named size. settings: those of MultimodalModel, such as embed_dim, image_size and dropout."""
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not known; use one of {', '.join(SIZES)}")
    return MultimodalModel(SIZES[size], num_classes=num_classes, size=size, **settings)


class MultimodalModel(nn.Module):
    """Embeds any subset of (picture, text, sound) into one space, and fuses what is given."""

    def __init__(
        self,
        widths: Widths,
        *,
        num_classes: int = 80,
        embed_dim: int = 512,
        image_size: int = 224,
        image_patch: int = 16,
        dropout: float = 0.0,
        attention: Literal["auto", "sdpa", "chunked"] = "auto",
        attention_chunk: int = 128,
        vocabulary: int = VOCABULARY,
        contrastive_loss: str = "infonce",
        init_std: float = 0.02,
        linear_path: bool = False,
        size: str = "custom",
    ):
        super().__init__()
        if image_size % image_patch:
            raise ValueError(f"image_size {image_size} is not a multiple of image_patch {image_patch}")
        self.config: dict[str, Any] = {
            "size": size,
            "num_classes": num_classes,
            "embed_dim": embed_dim,
            "image_size": image_size,
            "image_patch": image_patch,
            "dropout": dropout,
            "attention": attention,
            "attention_chunk": attention_chunk,
            "vocabulary": vocabulary,
            "contrastive_loss": contrastive_loss,
            "init_std": init_std,
            "linear_path": linear_path,
        }
        self.image_patch, self.grid = image_patch, image_size // image_patch
        options: dict[str, Any] = {"dropout": dropout, "kind": attention, "chunk": attention_chunk}
        image, text, audio = widths.image[0], widths.text[0], widths.audio[0]

        self.image_patches = nn.Conv2d(3, image, image_patch, image_patch)
        self.image_class = nn.Parameter(torch.zeros(1, 1, image))
        self.image_positions = nn.Parameter(torch.zeros(1, self.grid**2 + 1, image))
        self.image_tower = Tower(*widths.image, **options)

        self.words = nn.Embedding(vocabulary, widths.word)
        self.word_projection = nn.Linear(widths.word, text, bias=False)
        self.text_positions = nn.Parameter(torch.zeros(1, MAX_TEXT, text))
        self.text_tower = Tower(*widths.text, **options)

        self.audio_patches = nn.Conv2d(1, audio, AUDIO_PATCH, AUDIO_PATCH)
        self.audio_class = nn.Parameter(torch.zeros(1, 1, audio))
        self.audio_bands = nn.Parameter(torch.zeros(AUDIO_BANDS, audio))
        self.audio_tower = Tower(*widths.audio, **options)

        self._add_fusion(widths, options)
        self._initialise()
        use_fast_products(self)

    # --- set-up -------------------------------------------------------------------------------------------------------

    def _add_fusion(self, widths: Widths, options: dict[str, Any]) -> None:
        """Embedding projections, the fusion tower with its heads, and the temperatures."""
        embed_dim, num_classes, fusion = self.config["embed_dim"], self.config["num_classes"], widths.fusion[0]
        towers = {"image": widths.image[0], "text": widths.text[0], "audio": widths.audio[0]}
        self.embed = nn.ModuleDict({name: nn.Linear(width, embed_dim, bias=False) for name, width in towers.items()})
        if self.config["linear_path"]:
            counts = {"image": IMAGE_FEATURES, "audio": AUDIO_FEATURES}
            self.linear = nn.ModuleDict({name: LinearPath(count, embed_dim) for name, count in counts.items()})
            self.linear["text"] = nn.Embedding(self.config["vocabulary"], embed_dim)
        self.to_fusion = nn.ModuleDict({name: nn.Linear(width, fusion) for name, width in towers.items()})
        self.modality_vectors = nn.ParameterDict({name: nn.Parameter(torch.zeros(fusion)) for name in MODALITIES})
        self.fuse_token = nn.Parameter(torch.zeros(1, 1, fusion))
        self.fusion_tower = Tower(*widths.fusion, **options)
        self.fused_output = nn.Linear(fusion, embed_dim)
        self.classifier = nn.Sequential(nn.LayerNorm(embed_dim, eps=1e-6), nn.Linear(embed_dim, num_classes))
        self.match_head = nn.Linear(embed_dim, 1)

        # Two temperatures: the pairs differ in difficulty. Shape (1,), since FSDP2 shards no scalars.
        self.log_scale, self.audio_log_scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.bias, self.audio_bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def _initialise(self) -> None:
        std = self.config["init_std"]
        for tower in (self.image_tower, self.text_tower, self.audio_tower, self.fusion_tower):
            tower.initialise(std)
        small_normal_(self.word_projection, std)
        to_fusion = map(self._linear, self.to_fusion.values())
        plain: list[nn.Linear | nn.Conv2d] = [
            self.image_patches,
            self.audio_patches,
            self.fused_output,
            self.match_head,
        ]
        for layer in (*plain, *to_fusion):
            small_normal_(layer)
        for layer in map(self._linear, self.embed.values()):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        for vector in (
            self.image_class,
            self.image_positions,
            self.text_positions,
            self.audio_class,
            self.audio_bands,
            self.fuse_token,
            *self.modality_vectors.values(),
        ):
            nn.init.normal_(vector, std=0.02)
        if self.config["linear_path"]:
            nn.init.zeros_(self.get_parameter("linear.text.weight"))
        nn.init.normal_(self.words.weight, std=std)
        self.words.weight[PAD] = 0
        last = self._linear(self.classifier[1])
        small_normal_(last, 0.01)
        nn.init.constant_(last.bias, math.log(POSITIVE_RATE / (1 - POSITIVE_RATE)))
        sigmoid = self.config["contrastive_loss"] == "siglip"
        for scale, bias in ((self.log_scale, self.bias), (self.audio_log_scale, self.audio_bias)):
            nn.init.constant_(scale, math.log(10) if sigmoid else math.log(1 / 0.07))
            nn.init.constant_(bias, -10.0)

    @staticmethod
    def _linear(layer: nn.Module) -> nn.Linear:
        assert isinstance(layer, nn.Linear)
        return layer

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute blocks in the backward pass, or keep their activations."""
        for tower in (self.image_tower, self.text_tower, self.audio_tower, self.fusion_tower):
            tower.grad_checkpointing = enabled

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm: vectors, positions, tokens, scalars, the word table."""
        tables = {
            "image_class",
            "image_positions",
            "text_positions",
            "audio_class",
            "audio_bands",
            "fuse_token",
            "words.weight",
        }
        return tables | {name for name, parameter in self.named_parameters() if parameter.ndim < 2}

    def num_parameters(self) -> int:
        """All parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def clamp_scales(self, largest: float = 100.0) -> None:
        """Keep both temperatures in [1, largest]; called after an optimizer step."""
        for scale in (self.log_scale, self.audio_log_scale):
            local = scale.to_local() if isinstance(scale, DTensor) else scale.data  # FSDP: this rank's part
            local.clamp_(0, math.log(largest))

    # --- towers -------------------------------------------------------------------------------------------------------

    def image_tokens(self, images_BCHW: Tensor, keep_BK: Tensor | None = None, *, first_only: bool = False) -> Tensor:
        """(B, 1 + patches, D): class token first. keep_BK: the patches that are seen, by index; None: all.

        first_only, here and below: the first token alone (B, 1, D), all that an embedding needs.
        """
        check_image(images_BCHW, self.image_patch)
        rows, columns = (side // self.image_patch for side in images_BCHW.shape[2:])
        tokens = cut_patches(self.image_patches, images_BCHW) + self._image_grid(rows, columns)
        tokens = pick_tokens(tokens, keep_BK)
        first = (self.image_class + self.image_positions[:, :1]).expand(len(tokens), -1, -1)
        return self.image_tower(torch.cat([first.to(tokens.dtype), tokens], 1), first_only=first_only)

    def _image_grid(self, rows: int, columns: int) -> Tensor:
        """Positions of the patches; another resolution is interpolated, bicubic, in fp32."""
        grid = self.image_positions[:, 1:]
        if (rows, columns) == (self.grid, self.grid):
            return grid
        square = rearrange(grid.float(), "1 (h w) D -> 1 D h w", h=self.grid)
        return rearrange(functional.interpolate(square, (rows, columns), mode="bicubic"), "1 D h w -> 1 (h w) D")

    def text_tokens(self, input_ids_BL: Tensor, mask_BL: Tensor, *, first_only: bool = False) -> Tensor:
        """(B, L, D); mask_BL: bool, True for tokens that are not padding."""
        length = input_ids_BL.shape[1]
        if length > MAX_TEXT:
            raise ValueError(f"input_ids has {length} tokens, the position table has {MAX_TEXT}; truncate the text")
        tokens = self.word_projection(self.words(input_ids_BL)) + self.text_positions[:, :length]
        return self.text_tower(tokens, mask_BL, first_only)

    def audio_tokens(
        self,
        audio_BTM: Tensor,
        audio_mask_BT: Tensor | None = None,
        keep_BK: Tensor | None = None,
        *,
        first_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, 1 + 5 T/16, D), time-major (the five bands of a time column adjacent), and the key mask or None.

        A patch is valid when any of its 16 frames is.
        """
        audio_BTM, audio_mask_BT = _pad_frames(audio_BTM, audio_mask_BT)
        patches = cut_patches(self.audio_patches, audio_BTM.unsqueeze(1))
        time_code = sinusoids(audio_BTM.shape[1] // AUDIO_PATCH, patches.shape[2], patches.device)
        code = rearrange(time_code, "t D -> t 1 D") + self.audio_bands
        tokens = patches + rearrange(code, "t f D -> (t f) D")
        mask_BN = None
        if audio_mask_BT is not None:
            valid = rearrange(audio_mask_BT, "B (t p) -> B t p", p=AUDIO_PATCH).any(-1)
            mask_BN = pick_tokens(repeat(valid, "B t -> B (t f) 1", f=AUDIO_BANDS), keep_BK).squeeze(-1)
            mask_BN = functional.pad(mask_BN, (1, 0), value=True)
        tokens = pick_tokens(tokens, keep_BK)
        first = self.audio_class.expand(len(tokens), -1, -1)
        return self.audio_tower(torch.cat([first.to(tokens.dtype), tokens], 1), mask_BN, first_only), mask_BN

    def embedding(self, name: str, tokens_BND: Tensor, path_BE: Tensor | None, normalize: bool = True) -> Tensor:
        """(B, E) from the first token, and where there is a linear path from that too; L2 norm in fp32."""
        projected = self.embed[name](tokens_BND[:, 0]).float()
        if path_BE is not None:
            projected = functional.normalize(projected, dim=-1) + PATH_SHARE * path_BE
        return functional.normalize(projected, dim=-1) if normalize else projected

    # What the linear path alone makes of pictures, texts and sounds, (B, E) of unit length; None without one.

    def image_path(self, images_BCHW: Tensor) -> Tensor | None:
        return self.linear["image"](picture_statistics(images_BCHW)) if self.config["linear_path"] else None

    def text_path(self, input_ids_BL: Tensor, mask_BL: Tensor) -> Tensor | None:
        if not self.config["linear_path"]:
            return None
        words_BL = (mask_BL & (input_ids_BL > MASK_TOKEN)).unsqueeze(-1)
        return functional.normalize((self.linear["text"](input_ids_BL).float() * words_BL).sum(1), dim=-1)

    def audio_path(self, audio_BTM: Tensor, audio_mask_BT: Tensor | None) -> Tensor | None:
        return self.linear["audio"](sound_statistics(audio_BTM, audio_mask_BT)) if self.config["linear_path"] else None

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """(B, E) of pictures (B, 3, H, W), normalised with the mean and std of multimodal/data/image.py."""
        tokens = self.image_tokens(images, first_only=True)
        return self.embedding("image", tokens, self.image_path(images), normalize)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None, normalize: bool = True) -> Tensor:
        """(B, E) of token ids (B, L); without a mask every id but [PAD] counts."""
        mask = _text_mask(input_ids, attention_mask)
        tokens = self.text_tokens(input_ids, mask, first_only=True)
        return self.embedding("text", tokens, self.text_path(input_ids, mask), normalize)

    def encode_audio(self, audio: Tensor, audio_mask: Tensor | None = None, normalize: bool = True) -> Tensor:
        """(B, E) of log-mel frames (B, T, 80)."""
        tokens, _ = self.audio_tokens(audio, audio_mask, first_only=True)
        return self.embedding("audio", tokens, self.audio_path(audio, audio_mask), normalize)

    # --- fusion -------------------------------------------------------------------------------------------------------

    def fuse(
        self, tokens: dict[str, Tensor], masks: dict[str, Tensor | None], modality_mask: dict[str, Tensor] | None = None
    ) -> Tensor:
        """(B, E), not normalised: the fuse token over the tokens of the given modalities.

        masks: per modality bool (B, N) or None. modality_mask: per modality bool (B,), False hides it in that sample.
        """
        parts, seen = [], []
        batch = len(next(iter(tokens.values())))
        needs_mask = bool(modality_mask) or any(masks.get(name) is not None for name in tokens)
        for name in MODALITIES:
            if name in tokens:
                parts.append(self.to_fusion[name](tokens[name]) + self.modality_vectors[name])
                mask = masks.get(name)
                if mask is None:
                    mask = torch.ones(tokens[name].shape[:2], dtype=torch.bool, device=tokens[name].device)
                if modality_mask and name in modality_mask:
                    mask = mask & modality_mask[name].unsqueeze(1)
                seen.append(mask)
        first = self.fuse_token.expand(batch, -1, -1).to(parts[0].dtype)
        mask_BN = torch.cat([torch.ones_like(seen[0][:, :1]), *seen], 1) if needs_mask else None
        return self.fused_output(self.fusion_tower(torch.cat([first, *parts], 1), mask_BN)[:, 0]).float()

    def heads(self, fused_BE: Tensor) -> dict[str, Tensor]:
        """logits (B, classes) and match_logits (B,) of fused features, fp32."""
        return {
            "logits": self.classifier(fused_BE).float(),
            "match_logits": self.match_head(fused_BE).squeeze(-1).float(),
        }

    def scales(self) -> dict[str, Tensor]:
        """Temperatures (exponentiated) and sigmoid biases, each of shape ()."""
        # .clone(): FSDP frees a parameter's memory after the forward pass, and a bare view of it would be empty.
        return {
            "logit_scale": self.log_scale.float().exp().squeeze(0),
            "audio_logit_scale": self.audio_log_scale.float().exp().squeeze(0),
            "logit_bias": self.bias.float().squeeze(0).clone(),
            "audio_logit_bias": self.audio_bias.float().squeeze(0).clone(),
        }

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        audio: Tensor | None = None,
        audio_mask: Tensor | None = None,
        modality_mask: dict[str, Tensor] | None = None,
        return_tokens: bool = False,
        fuse: bool = True,
    ) -> dict[str, Any]:
        """Embed and fuse what is given. Keys of absent modalities are absent.

        images (B, 3, H, W); input_ids, attention_mask (B, L); audio (B, T, 80); audio_mask (B, T), True for frames that
        count. Returns image_embeds, text_embeds, audio_embeds (B, E, unit length), the temperatures, and with fuse
        fused_features (B, E), logits (B, classes), match_logits (B,); with return_tokens also `tokens`.
        Raises ValueError naming the argument that does not fit.
        """
        check_inputs(
            {"images": images, "input_ids": input_ids, "audio": audio},
            {"attention_mask": (attention_mask, "input_ids"), "audio_mask": (audio_mask, "audio")},
            modality_mask,
        )
        tokens: dict[str, Tensor] = {}
        masks: dict[str, Tensor | None] = {}
        paths: dict[str, Tensor | None] = {}
        # Each tower by itself. An embedding reads the first token alone; only fusion needs the others.
        first_only = not (fuse or return_tokens)
        if images is not None:
            tokens["image"] = self.image_tokens(images, first_only=first_only)
            paths["image"] = self.image_path(images)
        if input_ids is not None:
            masks["text"] = mask = _text_mask(input_ids, attention_mask)
            tokens["text"] = self.text_tokens(input_ids, mask, first_only=first_only)
            paths["text"] = self.text_path(input_ids, mask)
        if audio is not None:
            tokens["audio"], masks["audio"] = self.audio_tokens(audio, audio_mask, first_only=first_only)
            paths["audio"] = self.audio_path(audio, audio_mask)
        # Into the common space, where cosines compare what came from different towers.
        found: dict[str, Any] = {
            f"{name}_embeds": self.embedding(name, value, paths[name]) for name, value in tokens.items()
        }
        found.update(self.scales())
        # One sequence of all tokens: what is absent is left out of it, not filled with zeros.
        if fuse:
            found["fused_features"] = self.fuse(tokens, masks, modality_mask)
            found.update(self.heads(found["fused_features"]))
        if return_tokens:
            found["tokens"] = tokens
        return found


# --- the linear path --------------------------------------------------------------------------------------------------

PATH_SHARE = 6.0  # length of what the path gives, next to 1 of the tower
SIDE = 64  # pixels: what these features see of a larger picture
GRID, COLOURS, COLOUR_ZONES = 8, 4, (1, 2, 3)  # pixels a side; levels of a channel; zones a side of the colours
BINS, EDGE_ZONES = 8, (2, 4, 8)  # directions of an edge; zones a side of the edges
HUES, BORDER_DISTANCE = 12, 0.15  # directions of a hue; from there on a colour counts as another than the border's
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # data/image.py's
# How many features each part of them has, in order: the fit counts all parts alike.
IMAGE_PARTS = (
    3 * GRID**2 + BINS * sum(n**2 for n in EDGE_ZONES),
    COLOURS**3 * sum(n**2 for n in COLOUR_ZONES),
    COLOURS**3,
    HUES + 5,
)
IMAGE_FEATURES = sum(IMAGE_PARTS)
SPANS, GROUPS = 8, 16  # stretches of a clip, groups of bands
FRAMES_A_SECOND, RHYTHM_SECONDS = 100, 2.56  # edges of rates are in units of 1 / 2.56 Hz
RHYTHM_GROUPS = 8
RHYTHM_EDGES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 18, 22, 26, 32, 38, 46, 56, 68, 83, 100)
GLIDE_EDGES = (1, 2, 3, 4, 6, 9, 13, 19, 28, 40, 60)
RIPPLE_EDGES = (0, 1, 2, 3, 5, 8, 12, 20)  # cycles over all bands
ONSET_EDGES = (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 26, 33, 41, 50, 60, 75, 90, 110, 130, 150, 180, 210, 240)  # frames
AUDIO_PARTS = (
    *(3 * [MEL_BANDS]),
    SPANS * GROUPS,
    RHYTHM_GROUPS * (len(RHYTHM_EDGES) - 1),
    (len(GLIDE_EDGES) - 1) * (2 * (len(RIPPLE_EDGES) - 1) - 1),
    len(ONSET_EDGES) - 1,
    2 * (MEL_BANDS - 2),
)
AUDIO_FEATURES = sum(AUDIO_PARTS)
SILENCE = 1e-3  # next to strengths of ripples, which are about 0.1 to 10


class LinearPath(nn.Module):
    """Features to the common space: what a few hundred samples can teach, next to a tower that needs many. Zero until
    modules/linear_path.py fits it in closed form; no gradient changes it.
    """

    def __init__(self, features: int, embed_dim: int):
        super().__init__()
        self.project = nn.Linear(features, embed_dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, features_BF: Tensor) -> Tensor:
        """(B, E) of unit length."""
        return functional.normalize(self.project(features_BF).float(), dim=-1)


@torch.no_grad()
def picture_statistics(images_BCHW: Tensor) -> Tensor:
    """(B, IMAGE_FEATURES) of normalised pictures, the parts in the order of IMAGE_PARTS: 8 x 8 pixels and histograms of
    the edges in 8 directions; histograms of 64 colours, of the whole and of zones (a pyramid, Lazebnik et al. 2006);
    then of what differs from the colour of the border, mostly the thing itself: 64 colours; hues, mean colour,
    brightness and saturation.
    """
    images = images_BCHW.float()
    if max(images.shape[2:]) > SIDE:
        images = functional.adaptive_avg_pool2d(images, SIDE)
    small = functional.adaptive_avg_pool2d(images, GRID)
    levels = torch.linspace(-1.5, 1.8, COLOURS, device=images.device)
    near = (-7 * (images.unsqueeze(2) - levels[:, None, None]).square()).softmax(2)  # B C levels H W
    grey = functional.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    strength = (across.square() + down.square() + 1e-8).sqrt()
    directions = torch.arange(BINS, device=images.device) * (math.pi / BINS)
    cosine = (across * directions.cos()[:, None, None] + down * directions.sin()[:, None, None]) / strength
    edges = strength * cosine.square().square()

    def zones(values: Tensor, sides: tuple[int, ...]) -> Tensor:
        fine = functional.adaptive_avg_pool2d(values, math.lcm(*sides))  # of which the zones are whole squares
        return torch.cat([functional.adaptive_avg_pool2d(fine, side).flatten(1).sqrt() for side in sides], 1)

    whole = zones(_colours(near), COLOUR_ZONES)
    return torch.cat([small.flatten(1), zones(edges, EDGE_ZONES), whole, _of_the_thing(images)], 1)


def _colours(near_BCLHW: Tensor) -> Tensor:
    """(B, levels^3, H, W): how near each pixel is to each colour, of how near its channels are to the levels."""
    red, green, blue = near_BCLHW.unbind(1)
    return torch.einsum("bihw,bjhw,bkhw->bijkhw", red, green, blue).flatten(1, 3)


def _of_the_thing(images_BCHW: Tensor) -> Tensor:
    """(B, 64 + HUES + 5): what the pixels that differ from the border's median colour have in common."""
    mean, std = (images_BCHW.new_tensor(own)[:, None, None] for own in (PIXEL_MEAN, PIXEL_STD))
    rgb = (images_BCHW * std + mean).clamp(0, 1)
    border_BCN = torch.cat([rgb[:, :, 0], rgb[:, :, -1], rgb[:, :, :, 0], rgb[:, :, :, -1]], 2).sort(2)[0]
    border = border_BCN[:, :, (border_BCN.shape[2] - 1) // 2, None, None]  # CUDA's median is not deterministic
    distance = (rgb - border).square().sum(1, keepdim=True).sqrt()
    thing = (distance / BORDER_DISTANCE).clamp(0, 1)  # B 1 H W
    levels = torch.linspace(0, 1, COLOURS, device=rgb.device)
    near = (-40 * (rgb.unsqueeze(2) - levels[:, None, None]).square()).softmax(2)
    highest = rgb.amax(1, keepdim=True)
    saturation = highest - rgb.amin(1, keepdim=True)
    # The angle around the grey axis: red - green, and red + green - 2 blue, each of unit length.
    red, green, blue = rgb.unbind(1)
    hue = torch.atan2((red - green) / 2**0.5, (red + green - 2 * blue) / 6**0.5).unsqueeze(1)
    centres = torch.arange(HUES, device=rgb.device)[:, None, None] * (2 * math.pi / HUES)
    hues = saturation * (hue - centres).cos().clamp_min(0) ** 6

    def mean_of(values: Tensor) -> Tensor:
        return (values * thing).sum((2, 3)) / thing.sum((2, 3)).clamp_min(1)

    colours = mean_of(_colours(near)).sqrt()
    return torch.cat([colours, mean_of(hues).sqrt(), mean_of(torch.cat([rgb, highest, saturation], 1))], 1)


@torch.no_grad()
def sound_statistics(audio_BTM: Tensor, audio_mask_BT: Tensor | None) -> Tensor:
    """(B, AUDIO_FEATURES) of log-mel frames, the parts in the order of AUDIO_PARTS: mean, maximum and change of each
    band; their course; how strongly groups of them rise and fall at 0.4 to 39 Hz (rhythm patterns, Pampalk et al.
    2002); how strongly ripples across the bands glide up or down, by rate and width (spectro-temporal modulations, Chi
    et al. 2005); how loud it is at times after its start; how much each band stands out between its neighbours.
    """
    audio = audio_BTM.float()
    frames = audio.shape[1]
    valid = torch.ones_like(audio[..., :1]) if audio_mask_BT is None else audio_mask_BT.unsqueeze(-1).float()
    count = valid.sum(1).clamp_min(1)
    mean = (audio * valid).sum(1) / count
    filled = audio.masked_fill(valid == 0, -1.5)
    change = ((audio[:, 1:] - audio[:, :-1]).abs() * valid[:, 1:]).sum(1) / count
    course = functional.adaptive_avg_pool2d((audio * valid).unsqueeze(1), (SPANS, GROUPS)).flatten(1)

    window = torch.hann_window(frames, device=audio.device)[:, None]
    varying = (audio - mean.unsqueeze(1)) * valid * window
    waves = torch.fft.rfft(varying.unflatten(2, (RHYTHM_GROUPS, -1)).mean(3), dim=1).abs() / count.sqrt().unsqueeze(1)
    rhythm = _means(waves, _rate_edges(RHYTHM_EDGES, frames), 1)
    ripples = torch.fft.fft(torch.fft.rfft(varying, dim=1), dim=2).abs() / count.sqrt().unsqueeze(1)
    ripples = _means(ripples, _rate_edges(GLIDE_EDGES, frames), 1)
    # Bin k of the second transform and bin -k are ripples that glide down and up.
    down = _means(ripples, RIPPLE_EDGES, 2)
    up = _means(ripples.flip(2).roll(1, 2), RIPPLE_EDGES, 2)[..., 1:]
    turn = (up - down[..., 1:]) / (up + down[..., 1:] + SILENCE)
    glides = torch.cat([(down + SILENCE).log(), turn], 2)

    loudness = filled.mean(2)
    onset = _means(loudness, ONSET_EDGES, 1)
    stands_out = (2 * audio[..., 1:-1] - audio[..., 2:] - audio[..., :-2]).clamp_min(0) * valid
    above = (loudness.unsqueeze(2) - loudness.amin(1)[:, None, None]) * valid
    loudest = (stands_out * above).sum(1) / above.sum(1).clamp_min(1e-6)
    peaks = torch.cat([loudest, stands_out.sum(1) / count], 1)
    parts = (mean, filled.amax(1), change, course, rhythm.flatten(1), glides.flatten(1), onset, peaks)
    return torch.cat(parts, 1)


def _rate_edges(edges: tuple[int, ...], frames: int) -> list[int]:
    """Edges in bins of a transform of so many frames, for edges in units of 1 / RHYTHM_SECONDS Hz."""
    return [min(round(edge * frames / RHYTHM_SECONDS / FRAMES_A_SECOND), frames // 2) for edge in edges]


def _means(values: Tensor, edges: Sequence[int], dim: int) -> Tensor:
    """Means over the stretches between edges along dim, in their order; a stretch has one place at least."""
    last = values.shape[dim] - 1
    starts = [min(low, last) for low in edges[:-1]]
    lengths = [max(1, min(high, last + 1) - start) for start, high in zip(starts, edges[1:], strict=True)]
    parts = zip(starts, lengths, strict=True)
    return torch.stack([values.narrow(dim, start, length).mean(dim) for start, length in parts], dim)


# --- small parts ------------------------------------------------------------------------------------------------------


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """(length, width) fixed code of places of Vaswani et al. 2017: sines in the first half, cosines in the second."""
    half = width // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1) * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def cut_patches(layer: nn.Conv2d, values_BCHW: Tensor) -> Tensor:
    """(B, patches, D), row by row: a convolution whose stride is its kernel, as one product."""
    p, q = layer.kernel_size
    patches = rearrange(values_BCHW, "B C (h p) (w q) -> B (h w) (C p q)", p=p, q=q)
    return linear(patches, layer.weight.flatten(1), layer.bias)


def pick_tokens(tokens_BND: Tensor, keep_BK: Tensor | None) -> Tensor:
    """The kept tokens of each sample, in the order of keep_BK; all for None."""
    if keep_BK is None:
        return tokens_BND
    return tokens_BND.gather(1, keep_BK.unsqueeze(-1).expand(-1, -1, tokens_BND.shape[-1]))


def _text_mask(input_ids_BL: Tensor, attention_mask_BL: Tensor | None) -> Tensor:
    return input_ids_BL != PAD if attention_mask_BL is None else attention_mask_BL.bool()


def _pad_frames(audio_BTM: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Fill up to a multiple of 16 frames with each clip's floor value, masked out."""
    if audio_BTM.ndim != 3 or audio_BTM.shape[-1] != MEL_BANDS or not audio_BTM.shape[1]:
        raise ValueError(f"audio: expected (batch, frames, {MEL_BANDS}), found {tuple(audio_BTM.shape)}")
    batch, frames, _ = audio_BTM.shape
    missing = -frames % AUDIO_PATCH
    if missing:
        floor = audio_BTM.amin((1, 2), keepdim=True).expand(-1, missing, MEL_BANDS)
        mask_BT = torch.ones(batch, frames, dtype=torch.bool, device=audio_BTM.device) if mask_BT is None else mask_BT
        audio_BTM, mask_BT = torch.cat([audio_BTM, floor], 1), functional.pad(mask_BT.bool(), (0, missing), value=False)
    return audio_BTM, None if mask_BT is None else mask_BT.bool()


# Arguments of the model's forward: a ValueError names what does not fit.


def check_image(images: Tensor, patch: int) -> None:
    """Pictures (B, 3, H, W) whose sides the patch divides."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError(
            f"images: expected (batch, 3, height, width) in multiples of {patch}, found {tuple(images.shape)}"
        )


def check_inputs(
    inputs: dict[str, Tensor | None], masks: dict[str, tuple[Tensor | None, str]], hidden: dict[str, Tensor] | None
) -> None:
    """At least one input, all of one batch size; masks (mask, the input it is of) have its first two sizes; hidden: one
    bool a sample for modalities that are given.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    if not given:
        raise ValueError(f"at least one of {', '.join(inputs)} is needed")
    first = next(iter(given))
    for name, value in given.items():
        if len(value) != len(given[first]):
            raise ValueError(f"{name} has batch size {len(value)}, {first} has {len(given[first])}; they must be equal")
    for name, (mask, of) in masks.items():
        if mask is not None and of not in given:
            raise ValueError(f"{name} is given without {of}")
        if mask is not None and mask.shape != given[of].shape[:2]:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}, {of} wants {tuple(given[of].shape[:2])}")
    names = dict(zip(MODALITIES, ("images", "input_ids", "audio"), strict=True))
    for name, seen in (hidden or {}).items():
        if name not in names:
            raise ValueError(f"modality_mask names {name!r}; known are {', '.join(names)}")
        if names[name] not in given:
            raise ValueError(f"modality_mask names {name!r}, which is not given")
        if seen.shape != (size := given[first].shape[:1]):
            raise ValueError(f"modality_mask[{name!r}] has shape {tuple(seen.shape)}, expected {tuple(size)}")
