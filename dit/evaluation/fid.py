"""Distances between two sets of pictures from their features: Frechet, kernel (KID), precision and recall.

Features are rows of (N, F). Heusel et al. 2017; Binkowski et al. 2018; Kynkaanniemi et al. 2019.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.metrics import frechet_gaussians, gaussian_of
from shared.rng import keyed_generator

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth (or pt_inception-2015-12-05-6726825d.pth)"


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The Frechet distance of two sets of features (N, F). UserError for fewer than two rows a side."""
    try:
        return frechet_gaussians(*gaussian_of(first), *gaussian_of(second))
    except ValueError as error:
        raise UserError(f"a Frechet distance cannot be taken: {error}; give more pictures") from None


def kernel_distance(
    first: np.ndarray, second: np.ndarray, *, subset: int = 1000, subsets: int = 100, seed: int = 0
) -> float:
    """KID: unbiased squared MMD with the kernel (x y / F + 1)^3, mean over subsets."""
    generator = np.random.default_rng(seed)
    size, width = min(subset, len(first), len(second)), first.shape[1]
    found = []
    for _ in range(subsets):
        x = first[generator.choice(len(first), size, replace=False)].astype(np.float64)
        y = second[generator.choice(len(second), size, replace=False)].astype(np.float64)
        xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        found.append(within - 2 * xy.mean())
    return float(np.mean(found))


def precision_recall(made: np.ndarray, real: np.ndarray, *, neighbours: int = 3) -> tuple[float, float]:
    """Share of made pictures inside the real manifold, and of real ones inside the made one."""
    made_t, real_t = torch.from_numpy(made).double(), torch.from_numpy(real).double()

    def radius(points: Tensor) -> Tensor:
        return torch.cdist(points, points).kthvalue(min(neighbours + 1, len(points)), dim=1).values

    between = torch.cdist(made_t, real_t)
    precision = (between <= radius(real_t)[None]).any(1).double().mean().item()
    recall = (between <= radius(made_t)[:, None]).any(0).double().mean().item()
    return precision, recall


class RandomFeatures(nn.Module):
    """A fixed random convolution network, for tests only: its distances mean nothing to anyone else."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, width, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        generator = keyed_generator(0, 51)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * (
                0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            )
        self.requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, F) from uint8 (B, 3, H, W)."""
        return self.layers(pictures.float() / 127.5 - 1)


def inception(weights: str | None) -> nn.Module:
    """The FID Inception network, 2048 features, from a local weights file; nothing is downloaded."""
    if weights is None or not Path(weights).is_file():
        where = "is not set" if weights is None else f"{weights}: no such file"
        raise UserError(f"--inception-weights {where}; give the file {INCEPTION_FILE} of torch-fidelity or pytorch-fid")
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError:
        raise UserError("FID needs torch-fidelity's Inception network: pip install torch-fidelity") from None
    try:
        return NoTrainInceptionV3(
            name="inception-v3-compat", features_list=["2048"], feature_extractor_weights_path=weights
        )
    except ModuleNotFoundError:
        raise UserError("FID needs torch-fidelity's Inception network: pip install torch-fidelity") from None
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"--inception-weights {weights}: not the FID Inception weights ({str(error)[:120]})") from None


@torch.no_grad()
def features(network: nn.Module, pictures: np.ndarray, *, device: torch.device, batch_size: int = 32) -> np.ndarray:
    """Features (N, F) of pictures (N, H, W, 3) uint8."""
    network = network.to(device).eval()
    parts = []
    for first in range(0, len(pictures), batch_size):
        batch = torch.from_numpy(pictures[first : first + batch_size]).permute(0, 3, 1, 2).contiguous().to(device)
        found = network(batch)
        parts.append((found[0] if isinstance(found, tuple | list) else found).flatten(1).cpu().numpy())
    return np.concatenate(parts)


def set_digest(pictures: np.ndarray) -> str:
    """SHA-256 of a set of pictures, so that a report names its reference exactly."""
    return hashlib.sha256(np.ascontiguousarray(pictures).tobytes()).hexdigest()
