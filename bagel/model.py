"""BAGEL: one decoder that reads and writes text tokens and image latents (Mixture of Transformers).

forward() is the only entry: a training pack gives per-token losses, a query with contexts gives logits or velocities.
The tokens of the two experts are kept apart (a `Pair`): text, then ViT; and VAE tokens. `Rows` holds the pack position
of each.
Letters of shapes: L tokens of a pack, D width, N latent tokens, C numbers of a latent token.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bagel.config import ModelConfig
from bagel.modules.transformer import LanguageModel, PackedAttention, PackLayout, Pair, Rows
from bagel.modules.vision import VisionModel
from bagel.sampling.context import CachedAttention, TextCache
from shared.engine.products import use_fast_products
from shared.errors import UserError
from shared.flow import linear_path

SEEING = ("vit_model.", "connector.")  # names of the vision tower's and the connector's weights
LEADS_BACK = re.compile(
    r"(o_proj|o_proj_moe_gen|out_proj|down_proj|layers\.\d+\.mlp\.fc2)$"
)  # into the sum of branches


def shift_times(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): keeps 0 and 1, and spends more of the path near noise for s > 1."""
    return shift * t / (1 + (shift - 1) * t)


def training_times(raw: Tensor, shift: float) -> Tensor:
    """Raw normals to times in [0, 1]: sigmoid, then shift. Minus infinity, a clean image, gives exactly 0."""
    return shift_times(torch.sigmoid(raw.float()), shift)


def sampling_times(num_timesteps: int, shift: float) -> Tensor:
    """The falling grid from 1 to 0 with num_timesteps points, hence num_timesteps - 1 model steps."""
    if num_timesteps < 2:
        raise UserError(f"num_timesteps {num_timesteps} leaves no step to take; give 2 or more")
    return shift_times(torch.linspace(1, 0, num_timesteps), shift)


def sincos_table(width: int, side: int) -> Tensor:
    """Fixed table (side^2, width) of a square grid: the first half encodes the column, the second half the row."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    code = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = code[None].expand(side, side, -1)
    row = code[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(side * side, width).float()


class PositionTable(nn.Module):
    """A fixed 2-D sine table as a frozen parameter, so that it keeps its name in a checkpoint of the released form."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(side * side, width), requires_grad=False)
        self.side = side
        self.reset()

    def reset(self) -> None:
        """Fill the table; nothing to do without memory (meta device)."""
        if not self.pos_embed.is_meta:
            with torch.no_grad():
                self.pos_embed.copy_(sincos_table(self.pos_embed.shape[1], self.side))

    def forward(self, position_N: Tensor) -> Tensor:
        return self.pos_embed[position_N]


class TimestepEmbedder(nn.Module):
    """t in [0, 1], not multiplied by 1000 -> 256 cosines and sines -> two linear layers."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.frequencies = frequencies

    def code(self, t_L: Tensor) -> Tensor:
        """[cos(t f), sin(t f)], f_i = 10000^(-i/128), in fp32: (L, 256)."""
        half = self.frequencies // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t_L.device) / half)
        angle = t_L.float()[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t_L: Tensor) -> Tensor:
        return self.mlp(self.code(t_L).to(next(self.mlp.parameters()).dtype))


class Connector(nn.Module):
    """Two linear layers that carry ViT features (L, vit width) to the language width."""

    def __init__(self, vit_width: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(vit_width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Bagel(nn.Module):
    """The trainable model; the autoencoder stays outside."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.language.hidden_size
        self.config = config
        self.language_model = LanguageModel(config.language)
        self.vit_model = VisionModel(config.vision)
        self.connector = Connector(config.vision.hidden_size, width)
        self.vit_pos_embed = PositionTable(width, config.vision.patches_per_side)
        self.latent_pos_embed = PositionTable(width, config.max_latent_size)
        self.time_embedder = TimestepEmbedder(width)
        self.vae2llm = nn.Linear(config.latent_width, width)
        self.llm2vae = nn.Linear(width, config.latent_width)
        use_fast_products(self)

    def initialize(self, only: str = "") -> "Bagel":
        """Random weights, of the modules whose names begin with `only`: matrices normal, biases 0, norms 1, and a zero
        output head.
        """
        for name, module in self.named_modules():
            if not f"{name}.".startswith(only):
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self._spread(name, module))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if "llm2vae.".startswith(only):
            nn.init.zeros_(self.llm2vae.weight)
        return self

    def _spread(self, name: str, module: nn.Linear | nn.Embedding) -> float:
        """Standard deviation of a matrix that starts from random."""
        config, seeing = self.config, name.startswith(SEEING)
        given = config.vision_initializer_range if seeing else config.initializer_range
        if given is not None:
            return given
        if isinstance(module, nn.Embedding):
            return 0.5
        layers = config.vision.num_hidden_layers if seeing else config.language.num_hidden_layers
        # 2 L branches of variance 1 / (2 L) add up to what they are added to
        return (module.in_features * (2 * layers if LEADS_BACK.search(name) else 1)) ** -0.5

    def freeze(self) -> "Bagel":
        """Take what the settings freeze out of training."""
        parts = {"freeze_llm": self.language_model, "freeze_vit": self.vit_model}
        for setting, part in parts.items():
            if self.config[setting]:
                part.requires_grad_(False).eval()
        if self.config.freeze_und:
            trained = (
                *(name for name, _ in self.named_parameters() if "_moe_gen" in name),
                "language_model.lm_head.weight",
            )
            heads = ("time_embedder.", "vae2llm.", "llm2vae.")
            for name, parameter in self.named_parameters():
                keep = name in trained or name.startswith(heads)
                parameter.requires_grad_(parameter.requires_grad and keep)
        return self

    def checkpoint_layers(self, enabled: bool) -> None:
        """Recompute the decoder's and the tower's layers in the backward pass."""
        self.language_model.model.gradient_checkpointing = enabled
        self.vit_model.vision_model.gradient_checkpointing = enabled

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A pack (key `sample_lens`), a query of contexts (key `contexts`) or the newest tokens of several texts (key
        `cache`); see losses_of, answer and next_logits.
        """
        if "cache" in batch:
            return self.next_logits(batch["newest"], batch["cache"])
        return self.answer(batch) if "contexts" in batch else self.losses_of(batch)

    # --- training ---

    def losses_of(self, pack: dict[str, Any]) -> dict[str, Tensor]:
        """ce: (predictions,) cross entropy; mse: (target latents, C) squared error of the velocity; t: (target
        latents,); fp32.

        Path: x_t = (1 - t) latent + t noise, so t = 1 is noise and the velocity points from data to noise. A pack
        without images, or without text to predict, runs the same modules on nothing and gives empty losses that still
        have gradients.
        """
        # Clean pictures have time 0 and pass through the same path unchanged, so that all latents are one tensor.
        t = training_times(pack["packed_timesteps"], self.config.timestep_shift)
        noisy, velocity = linear_path(pack["packed_latents"], pack["packed_noise"], t)

        # Each expert multiplies its own tokens alone; they meet in the attention, which wants the order of the pack.
        und, gen, rows = self.embed(pack, noisy, t)
        attention = PackedAttention(self._layout(pack), rows, self.backend(und.device))
        und, gen = self.language_model.model(und, gen, _positions(pack, rows), attention, self.config.freeze_und)

        # The head is as wide as the vocabulary: it sees the tokens that predict one, and no other.
        predicting = und[_rows_of(pack["packed_text_indexes"], pack["ce_loss_indexes"])]
        target = _rows_of(pack["packed_vae_token_indexes"], pack["mse_loss_indexes"])
        predicted = self.llm2vae(gen[target]).float()
        return {
            "ce": self.language_model.lm_head(predicting, pack["packed_label_ids"], self.config.logits_chunk),
            "mse": (predicted - velocity[target]) ** 2,
            "t": t[target],
        }

    def embed(self, pack: dict[str, Any], latents_NC: Tensor, t_N: Tensor) -> tuple[Tensor, Tensor, Rows]:
        """Tokens of the understanding expert (text, then ViT), of the generation expert, and their pack positions."""
        text = self.language_model.model.embed_tokens(pack["packed_text_ids"])
        vit, vae = self._seen_tokens(pack), self._latent_tokens(pack, latents_NC, t_N)
        rows = Rows(
            torch.cat([pack["packed_text_indexes"], pack["packed_vit_token_indexes"]]), pack["packed_vae_token_indexes"]
        )
        wide = torch.promote_types(text.dtype, vae.dtype)
        return torch.cat([text.to(wide), vit.to(wide)]), vae.to(wide), rows

    def _seen_tokens(self, pack: dict[str, Any]) -> Tensor:
        """Pictures as the vision tower sees them, (patches, D)."""
        cells = pack["packed_vit_position_ids"]
        flex = self.backend(cells.device) == "flex"
        features = self.connector(self.vit_model(pack["packed_vit_tokens"], cells, pack["vit_token_seqlens"], flex))
        return features + self.vit_pos_embed(cells).to(features.dtype)

    def _latent_tokens(self, pack: dict[str, Any], latents_NC: Tensor, t_N: Tensor) -> Tensor:
        """Pictures as latents at their times, (N, D); one time may stand for all."""
        vae = self.vae2llm(latents_NC.to(self.vae2llm.weight.dtype))
        return vae + self.time_embedder(t_N) + self.latent_pos_embed(pack["packed_latent_position_ids"]).to(vae.dtype)

    def _layout(self, pack: dict[str, Any]) -> PackLayout:
        return PackLayout(pack["sample_lens"], pack["split_lens"], pack["attn_modes"], pack.get("static_length"))

    def backend(self, device: torch.device) -> str:
        """The attention of packs on this device."""
        given = self.config.attention
        if given == "auto":
            return "flex" if device.type == "cuda" else "dense"
        return "dense" if given == "sliced" else given

    # --- inference ---

    def answer(self, query: dict[str, Any]) -> dict[str, Tensor]:
        """Run new tokens of several contexts, each seeing its own past.

        query: the token fields of a pack, `query_lens`, `causal`, `store` (append to the contexts), `t` (1,) of all
        latents, `want`: logits (of all text tokens), velocity (of all latents) or none; `repeats`: it comes again with
        other latents, and keeps its `attention` for that.
        """
        if len(query["latents"]) == 0:
            return self._understood(query)
        text = self.language_model.model.embed_tokens(query["packed_text_ids"])
        vae = self._latent_tokens(query, query["latents"], query["t"])
        rows = Rows(query["packed_text_indexes"], query["packed_vae_token_indexes"])
        wide = torch.promote_types(text.dtype, vae.dtype)
        und, gen = self.language_model.model(
            text.to(wide), vae.to(wide), _positions(query, rows), self._attention(query, rows)
        )
        if query["want"] == "logits":
            return {"logits": self.language_model.lm_head(und).float()}
        return {"velocity": self.llm2vae(gen).float()} if query["want"] == "velocity" else {}

    def _understood(self, query: dict[str, Any]) -> dict[str, Tensor]:
        """The same where nothing is generated: the tokens stand in their own order, and one expert runs."""
        x = self.language_model.model.embed_tokens(query["packed_text_ids"])
        if len(query["packed_vit_tokens"]):  # a tower without a picture is not called
            vit = self._seen_tokens(query)
            both = torch.cat([x, vit.to(x.dtype)])
            x = torch.empty_like(both)
            x[torch.cat([query["packed_text_indexes"], query["packed_vit_token_indexes"]])] = both
        nowhere = query["packed_vae_token_indexes"]
        attention = self._attention(query, Rows(nowhere, nowhere))
        x = self.language_model.model.understand(x, query["packed_position_ids"], attention.in_order)
        if query["want"] != "logits":
            return {}
        text = x[query["packed_text_indexes"]]
        return {"logits": self.language_model.lm_head(self.language_model.model.norm(text)).float()}

    def _attention(self, query: dict[str, Any], rows: Rows) -> CachedAttention:
        if query.get("attention") is None:
            query["attention"] = CachedAttention(
                query["contexts"],
                query["query_lens"],
                rows,
                causal=query["causal"],
                store=query["store"],
                repeats=query.get("repeats", False),
            )
        return query["attention"]

    def next_logits(self, newest_B: Tensor, cache: TextCache) -> dict[str, Tensor]:
        """logits (B, V), fp32, behind the newest token of each of several texts, which joins the cache."""
        cache.begin()
        x = self.language_model.model.embed_tokens(newest_B)
        x = self.language_model.model.understand(x, cache.position, cache)
        cache.end()
        return {"logits": self.language_model.lm_head(self.language_model.model.norm(x)).float()}


def _positions(pack: dict[str, Any], rows: Rows) -> Pair:
    """Rotary positions of the tokens of each expert."""
    return pack["packed_position_ids"][rows.und], pack["packed_position_ids"][rows.gen]


def _rows_of(indexes: Tensor, subset: Tensor) -> Tensor:
    """Where the members of `subset` stand in the sorted `indexes`."""
    return torch.searchsorted(indexes, subset)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Values in all, in each expert, and in each small part, as the released model's table gives them."""
    counts = {
        "total": 0,
        "trainable": 0,
        "understanding expert": 0,
        "generation expert": 0,
        "embedding and head": 0,
        "vision tower": 0,
    }
    for name, parameter in model.named_parameters():
        if "moe_gen" in name:
            part = "generation expert"
        elif name.startswith(("language_model.lm_head", "language_model.model.embed_tokens")):
            part = "embedding and head"
        elif name.startswith("language_model."):
            part = "understanding expert"
        else:
            part = "vision tower" if name.startswith("vit_model.") else name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
        counts["total"] += parameter.numel()
        counts["trainable"] += parameter.numel() * parameter.requires_grad
    return counts
