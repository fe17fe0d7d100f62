"""Measures that several systems report: Frechet distance, KID, FID, CLIP score, colours, a paired test.

Shapes: N samples, F features, H W pixels, K colour names.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import UserError, load_whole, opening

# --- distances between two sets of features ---


def gaussian_of(features_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (F,) and the covariance (F, F) of N rows, float64. ValueError: fewer than two rows, not finite."""
    rows = np.asarray(features_NF, np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"features of shape {rows.shape}; (N, F) with N of at least 2 expected")
    if not np.isfinite(rows).all():
        raise ValueError("features hold numbers that are not finite")
    return rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False))


def frechet_gaussians(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (Dowson and Landau 1982), float64.

    The trace of the root is the sum of the roots of a symmetric matrix's eigenvalues; the root of C_a C_b, which is
    not symmetric, has returned complex numbers and NaN. Biased upward for few samples: compare equal numbers only.
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(moment, np.float64) for moment in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = np.linalg.eigh((cov_a + cov_a.T) / 2)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


def frechet_distance(first_NF: np.ndarray | Tensor, second_NF: np.ndarray | Tensor) -> float:
    """The Frechet distance of two sets of features: FID on pictures, FVD on clips (Heusel et al. 2017, eq. 6).

    ValueError: fewer than two rows, numbers that are not finite, or sets of different widths.
    """
    first, second = (gaussian_of(np.asarray(rows)) for rows in (first_NF, second_NF))
    if len(first[0]) != len(second[0]):
        raise ValueError(f"features are {len(first[0])} and {len(second[0])} wide; use one extractor for both")
    return frechet_gaussians(*first, *second)


def kernel_distance(
    first_NF: np.ndarray | Tensor,
    second_NF: np.ndarray | Tensor,
    *,
    subset: int = 1000,
    subsets: int = 100,
    seed: int = 0,
) -> float:
    """KID: the unbiased squared MMD with the kernel (x y / F + 1)^3, mean over subsets (Binkowski et al. 2018).

    ValueError: fewer than two rows on one side.
    """
    first, second = np.asarray(first_NF), np.asarray(second_NF)
    generator = np.random.default_rng(seed)
    size, width = min(subset, len(first), len(second)), first.shape[1]
    if size < 2:
        raise ValueError(f"a kernel distance needs two or more rows on each side, found {len(first)} and {len(second)}")
    found = []
    for _ in range(subsets):
        x = first[generator.choice(len(first), size, replace=False)].astype(np.float64)
        y = second[generator.choice(len(second), size, replace=False)].astype(np.float64)
        xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        found.append(within - 2 * xy.mean())
    return float(np.mean(found))


def precision_recall(
    made_NF: np.ndarray | Tensor, real_NF: np.ndarray | Tensor, *, neighbours: int = 3
) -> tuple[float, float]:
    """Share of made samples inside the real manifold, and of real ones inside the made one.

    Kynkaanniemi et al. 2019: a manifold is the balls round its samples that reach their nearest `neighbours`.
    """
    made, real = (torch.as_tensor(np.asarray(rows)).double() for rows in (made_NF, real_NF))
    block = 1024  # rows of a distance matrix at a time: a whole one of 50,000 samples would take 20 GB

    def radius(points: Tensor) -> Tensor:
        nearest = min(neighbours + 1, len(points))
        return torch.cat([torch.cdist(part, points).kthvalue(nearest, dim=1).values for part in points.split(block)])

    def inside(points: Tensor, others: Tensor) -> float:
        reach = radius(others)[None]
        hits = [(torch.cdist(part, others) <= reach).any(1) for part in points.split(block)]
        return torch.cat(hits).double().mean().item()

    return inside(made, real), inside(real, made)


@torch.no_grad()
def picture_features(
    network: nn.Module, pictures: Sequence[np.ndarray], *, device: torch.device, batch_size: int = 32
) -> np.ndarray:
    """Features (N, F) of pictures, each (H, W, 3) uint8, in runs of equal size.

    network: `shared.media.inception.inception(path)`, or any module from uint8 (B, 3, H, W) to (B, F).
    """
    network = network.to(device).eval()
    parts, first = [], 0
    while first < len(pictures):
        last = first + 1
        while last < min(first + batch_size, len(pictures)) and pictures[last].shape == pictures[first].shape:
            last += 1
        batch = np.stack([np.asarray(picture) for picture in pictures[first:last]])
        found = network(torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().to(device))
        parts.append(found.flatten(1).float().cpu().numpy())
        first = last
    return np.concatenate(parts)


def paired_p(difference_N: Tensor) -> float:
    """One-sided p that the mean of paired differences is not above 0 (Student's t)."""
    from scipy.stats import t as student

    count = len(difference_N)
    spread = difference_N.double().std().item() if count > 1 else 0.0
    if spread == 0:
        return 1.0
    return float(student.sf(difference_N.double().mean().item() / (spread / count**0.5), count - 1))


# --- colours: do pictures show the colours that their captions name? Measured on pixels, without another model ---

NAMES = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "grey", "black")
_SAME = {"gray": "grey", "cyan": "teal", "turquoise": "teal", "violet": "purple", "golden": "yellow", "gold": "yellow"}
_WORD = re.compile("[a-z]+")
_SIGNS = {
    "red": "\u7ea2",
    "orange": "\u6a59",
    "yellow": "\u9ec4",
    "green": "\u7eff",
    "teal": "\u9752",
    "blue": "\u84dd",
    "purple": "\u7d2b",
    "pink": "\u7c89",
    "brown": "\u68d5",
    "grey": "\u7070",
    "black": "\u9ed1",
    "white": "\u767d",
}
# Chinese is written without spaces: words in which a colour's sign names no colour. In the order of _SIGNS: sweet
# potato; orange (fruit, juice); cucumber, butter, dusk, gold's metal, Yellow River; mung bean; frog, youth, young,
# youngster; bluetooth, blueberry; laver; powder, flour, vermicelli; palm; dust; blackboard, night, dark; daytime,
# cabbage, understand, blank.
_NOT_COLOURS = re.compile(
    "\u7ea2\u85af|\u6a59\u5b50|\u6a59\u6c41|\u9ec4\u74dc|\u9ec4\u6cb9|\u9ec4\u660f|\u9ec4\u91d1|\u9ec4\u6cb3|\u7eff\u8c46|"
    "\u9752\u86d9|\u9752\u5e74|\u9752\u6625|\u9752\u5c11\u5e74|\u84dd\u7259|\u84dd\u8393|\u7d2b\u83dc|\u7c89\u672b|\u9762\u7c89|"
    "\u7c89\u4e1d|\u68d5\u6988|\u7070\u5c18|\u9ed1\u677f|\u9ed1\u591c|\u9ed1\u6697|\u767d\u5929|\u767d\u83dc|\u660e\u767d|\u7a7a\u767d"
)
_PINK = "\u7c89\u7ea2"  # pink is written "powder red" and is not red


def named_colours(text: str, *, white: bool = False) -> set[str]:
    """The colours that an English or Chinese text names, by whole words: "hundred" is not red, gray is grey.

    White is left out unless asked for: the ground of the sample pictures is white.
    """
    found = {_SAME.get(word, word) for word in _WORD.findall(text.lower())}
    signs = _NOT_COLOURS.sub(" ", text).replace(_PINK, _SIGNS["pink"])
    found |= {name for name, sign in _SIGNS.items() if sign in signs}
    return found & ({*NAMES, "white"} if white else set(NAMES))


def colour_caption(captions: tuple[str, ...]) -> str:
    """The first caption that names a colour, else the first."""
    return next((text for text in captions if named_colours(text)), captions[0])


def colour_shares(pictures: np.ndarray) -> np.ndarray:
    """Share (N, K) of each colour among the pixels that are not near white, from pictures (N, H, W, 3) uint8."""
    rgb = pictures.astype(np.float32) / 255
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    saturation = spread / np.maximum(high, 1e-6)
    hue = _hue(rgb, high, spread)
    coloured = saturation > 0.2
    foreground = coloured | (high < 0.85)
    bins = {
        "red": (hue < 14) | (hue >= 345),
        "orange": (hue >= 14) & (hue < 40),
        "yellow": (hue >= 40) & (hue < 66),
        "green": (hue >= 66) & (hue < 165),
        "teal": (hue >= 165) & (hue < 195),
        "blue": (hue >= 195) & (hue < 250),
        "purple": (hue >= 250) & (hue < 295),
        "pink": (hue >= 295) & (hue < 345),
    }
    masks = {name: coloured & (high >= 0.2) & inside for name, inside in bins.items()}
    light_red = masks["red"] & (saturation < 0.5) & (high > 0.7)
    masks["pink"] = masks["pink"] | light_red
    masks["red"] = masks["red"] & ~light_red
    brown = (masks["red"] | masks["orange"]) & (high < 0.65)
    masks["brown"] = brown
    masks["red"], masks["orange"] = masks["red"] & ~brown, masks["orange"] & ~brown
    masks["grey"] = ~coloured & (high >= 0.25) & (high < 0.85)
    masks["black"] = high < 0.25
    count = np.maximum(foreground.sum((1, 2)), 1)
    return np.stack([(masks[name] & foreground).sum((1, 2)) / count for name in NAMES], axis=1)


def agreement(pictures: np.ndarray, captions: list[str], *, draws: int = 2000) -> dict[str, float]:
    """Mean share of the named colours in their own picture and in all others, and the p of a permutation test.

    Captions without a colour are left out; "pictures" is how many count.
    """
    named = [named_colours(caption) for caption in captions]
    rows = [row for row, names in enumerate(named) if names]
    if len(rows) < 2:
        return {"pictures": float(len(rows))}
    wanted = np.array([[name in named[row] for name in NAMES] for row in rows], dtype=np.float32)
    scores = colour_shares(pictures[rows]) @ wanted.T  # (picture, caption)
    own = np.diag(scores).mean()
    other = (scores.sum() - np.trace(scores)) / (scores.size - len(rows))
    generator = np.random.default_rng(0)
    permuted = [scores[np.arange(len(rows)), generator.permutation(len(rows))].mean() for _ in range(draws)]
    p = (1 + sum(value >= own for value in permuted)) / (1 + draws)
    return {"own": float(own), "shuffled": float(other), "p": float(p), "pictures": float(len(rows))}


def _hue(rgb: np.ndarray, high: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Hue in degrees."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    safe = np.maximum(spread, 1e-6)
    hue = np.where(
        high == red,
        (green - blue) / safe % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return hue * 60


# --- CLIP score, by a CLIP model that should not be the one that conditioned the drawing ---


class ClipScorer:
    """Cosines of pictures and texts under the CLIP model of --clip-path: a local folder, or a name on the hub.

    UserError: none is given, the folder is not there, or it holds no CLIP model.
    """

    def __init__(self, path: str | None, *, device: torch.device | str = "cpu") -> None:
        if path is None:
            raise UserError("the CLIP score needs a model: --clip-path FOLDER, or openai/clip-vit-large-patch14")
        if not Path(path).is_dir() and (path.count("/") != 1 or path[0] in "./~"):
            raise UserError(
                f"--clip-path {path}: not a folder; give a folder, or a name such as openai/clip-vit-base-patch32"
            )
        from transformers import CLIPModel, CLIPProcessor

        with opening(f"--clip-path {path}", "the folder holds no CLIP model; give another"):
            model: nn.Module = load_whole(CLIPModel, path)
            self.model = model.to(device).eval()
            self.processor = CLIPProcessor.from_pretrained(path)
        self.path, self.device = path, device

    @torch.no_grad()
    def embed(self, pictures: Sequence, texts: Sequence[str], *, batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """Unit rows of pictures and of texts, both (N, F), on the CPU. pictures: PIL, or (H, W, 3) uint8."""
        image_rows, text_rows = [], []
        for first in range(0, len(pictures), batch_size):
            part = slice(first, first + batch_size)
            inputs = self.processor(
                text=list(texts[part]), images=list(pictures[part]), return_tensors="pt", padding=True, truncation=True
            ).to(self.device)
            output = self.model(**inputs)
            image_rows.append(output.image_embeds.float().cpu())
            text_rows.append(output.text_embeds.float().cpu())
        images, words = (nn.functional.normalize(torch.cat(rows), dim=1) for rows in (image_rows, text_rows))
        return images, words

    def cosines(self, texts: Sequence[str], pictures: Sequence) -> list[float]:
        """One cosine for each pair."""
        images, words = self.embed(pictures, texts)
        return (images * words).sum(1).tolist()


def clip_score(
    pictures: Sequence,
    captions: Sequence[str],
    model: str | ClipScorer | None,
    *,
    device: torch.device,
    batch_size: int = 32,
) -> dict[str, float | int | str]:
    """Mean of max(100 cos, 0) over pairs (Hessel et al. 2021), and the share of pictures whose own caption fits best
    of at most 100. model: a CLIP by path or name, or opened already.

    Scores of different CLIP models do not compare; the model's name is part of the answer.
    """
    scorer = model if isinstance(model, ClipScorer) else ClipScorer(model, device=device)
    images, texts = scorer.embed(pictures, captions, batch_size=batch_size)
    among = (images[:100] @ texts[:100].T).argmax(1)
    return {
        "score": (100 * (images * texts).sum(1)).clamp_min(0).mean().item(),
        "r_at_1": (among == torch.arange(len(among))).double().mean().item(),
        "among": len(among),
        "model": scorer.path,
    }
