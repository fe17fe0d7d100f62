"""Figures of pictures as papers print them: FID, sFID, Inception score, precision and recall, KID; PSNR and SSIM.

Pictures come from a folder, an .npz (ADM's form, arr_0) or an array, and are read in batches of fixed places, shared
over the ranks: memory stays flat and the numbers do not depend on the number of ranks. Heusel et al. 2017 (FID), Nash
et al. 2021 (sFID), Salimans et al. 2016 (Inception score), Kynkaanniemi et al. 2019 (precision, recall), Binkowski et
al. 2018 (KID). Shapes: N pictures, F features, H W pixels.
"""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dit.data.readers import IMAGE_SUFFIXES
from dit.dataset import decode
from shared.engine.dist import DistInfo, gather_objects
from shared.errors import BadSample, UserError
from shared.media.folders import is_junk
from shared.media.inception import SIDE, FIDInception, ScriptedFeatures
from shared.metrics import frechet_gaussians, gaussian_of, kernel_distance, precision_recall
from shared.rng import keyed_generator

BATCH = 32  # pictures that pass the network together: fixed, so that their features do not depend on the ranks
SPATIAL = 7  # channels of the 17 x 17 features that sFID looks at


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return (10 * torch.log10(4 / (found - wanted.to(found.device)).square().mean().clamp_min(1e-12))).item()


def ssim(found: Tensor, wanted: Tensor) -> float:
    """Structural similarity of images (B, C, H, W) in [-1, 1], at least 11 pixels a side (Wang et al. 2004, eq. 13):
    windows of 11 pixels weighted by a normal curve of deviation 1.5, constants 0.01 and 0.03, mean over all.
    """
    curve = torch.exp(-torch.arange(-5.0, 6.0, dtype=torch.float64).square() / (2 * 1.5**2))
    window = torch.outer(curve, curve) / curve.sum() ** 2
    x, y = (images.double().flatten(0, 1)[:, None] for images in (found, wanted.to(found.device)))

    def mean(values: Tensor) -> Tensor:
        return nn.functional.conv2d(values, window.to(values)[None, None])

    mean_x, mean_y = mean(x), mean(y)
    spread_x, spread_y, shared = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    low, high = (2 * 0.01) ** 2, (2 * 0.03) ** 2
    share = (2 * mean_x * mean_y + low) * (2 * shared + high)
    return (share / ((mean_x**2 + mean_y**2 + low) * (spread_x + spread_y + high))).mean().item()


# --- pictures ---------------------------------------------------------------------------------------------------------


class Pictures:
    """Pictures in order: a folder of files (by name), an .npz with arr_0 uint8 (N, H, W, 3), or such an array."""

    def __init__(self, source: str | Path | np.ndarray) -> None:
        self.array: np.ndarray | None = source if isinstance(source, np.ndarray) else None
        self.name = "array" if self.array is not None else str(source)
        self.files: list[Path] = []
        path = Path(self.name)
        if self.array is None and path.is_dir():
            self.files = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in IMAGE_SUFFIXES and file.stem != "grid" and not is_junk(file)
            )
        elif self.array is None:
            self.array = _array_of(path)
        if self.array is not None and (
            self.array.ndim != 4 or self.array.shape[3] != 3 or self.array.dtype != np.uint8
        ):
            raise UserError(
                f"{self.name}: pictures uint8 (N, H, W, 3) are expected, found {self.array.dtype} {self.array.shape}"
            )
        if not self.files and (self.array is None or 0 in self.array.shape):
            raise UserError(
                f"{self.name}: holds no pictures; an .npz, or a folder with {', '.join(IMAGE_SUFFIXES)} directly in "
                "it, is expected"
            )

    def __len__(self) -> int:
        return len(self.files) if self.array is None else len(self.array)

    def __getitem__(self, index: int) -> np.ndarray:
        if self.array is not None:
            return np.asarray(self.array[index])
        try:  # as training reads them
            return np.asarray(decode(self.files[index].read_bytes(), str(self.files[index])))
        except (OSError, BadSample) as error:
            raise UserError(f"{error}; remove or draw it again") from None

    def digest(self) -> str:
        """SHA-256 over all pictures, so that a report names its sets exactly."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(np.ascontiguousarray(self[index]).tobytes())
        return digest.hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a damaged archive raises, as one sentence."""
    try:
        yield
    except KeyError as error:
        name = re.search("arr_0|sigma_s|sigma|mu_s|mu|$", str(error))
        raise UserError(
            f"{path}: holds no {name and name[0]}; an .npz of pictures, or of ADM's statistics, is expected"
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as a folder of pictures or an .npz ({error})") from None


def _array_of(path: Path) -> np.ndarray:
    """arr_0 of an .npz: mapped from the disk where it is stored as it is, else read whole."""
    with _reading(path):
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("arr_0.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                return np.load(path)["arr_0"]
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, is_fortran, dtype = read(file)
                header = file.tell()
        with open(path, "rb") as raw:  # the local header, whose extra field may differ from the directory's
            raw.seek(member.header_offset + 26)
            name_size, extra_size = (int.from_bytes(raw.read(2), "little") for _ in range(2))
        offset = member.header_offset + 30 + name_size + extra_size + header
        if dtype.hasobject or is_fortran:
            raise ValueError("a plain array in C order is expected")
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def _statistics_of(path: Path) -> dict[str, np.ndarray]:
    """mu, sigma, mu_s and sigma_s of an .npz, those that are there, checked; none for one of pictures alone."""
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        found = {}
        for mean, spread in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if not names & {mean, spread}:
                continue
            held = np.load(path)
            found[mean], found[spread] = held[mean], held[spread]
            size = found[mean].size
            if found[mean].shape != (size,) or found[spread].shape != (size, size):
                raise ValueError(f"{mean} {found[mean].shape} and {spread} {found[spread].shape} do not fit each other")
            if not (np.isfinite(found[mean]).all() and np.isfinite(found[spread]).all()):
                raise ValueError(f"{mean} or {spread} holds numbers that are not finite")
        return found


# --- features ---------------------------------------------------------------------------------------------------------


class RandomFeatures(nn.Module):
    """A fixed random convolution network, for tests only: its distances mean nothing to anyone else."""

    classes: Tensor
    spatial: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 5, stride=2), nn.Conv2d(32, width, 3, stride=2)
        generator = keyed_generator(0, 51)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * (
                0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            )
        self.register_buffer("classes", torch.randn(10, width, generator=generator))
        self.requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, F) from (B, 3, H, W) of 0 to 255."""
        x = nn.functional.relu(self.second(nn.functional.relu(self.first(pictures.float() / 127.5 - 1))))
        self.spatial = nn.functional.adaptive_avg_pool2d(x[:, :SPATIAL], 4)
        return x.mean((2, 3))


class Features(NamedTuple):
    """What the network says of N pictures: pooled (N, F), spatial (N, S) and class probabilities (N, K), float32."""

    pooled: np.ndarray
    spatial: np.ndarray | None
    classes: np.ndarray | None


class Extractor:
    """Features of pictures by a FID network, or by the random one.

    resize: legacy is TensorFlow 1's bilinear rule, as in the FID of papers; clean is Pillow's antialiased bicubic
    (Parmar et al. 2022), whose figures compare with its own kind only.
    """

    def __init__(
        self, network: RandomFeatures | FIDInception | ScriptedFeatures, *, device: torch.device, resize: str = "legacy"
    ) -> None:
        self.network, self.device, self.resize = network.to(device).eval(), device, resize
        is_random = isinstance(network, RandomFeatures)
        self.name = "RANDOM, for tests only" if is_random else f"Inception of 2015-12-05, 299 pixels, {resize} resizing"
        self.classes = None if network.classes is None else network.classes.float().to(device)
        self._spatial: Tensor | None = None
        if isinstance(network, FIDInception):
            # mixed_6/conv of TensorFlow's graph: the first branch of this block, 17 x 17
            network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL]

    @torch.no_grad()
    def __call__(self, pictures: list[np.ndarray]) -> Features:
        """Features of a batch of pictures (H, W, 3) uint8 of one size."""
        if self.resize == "clean":
            batch = torch.from_numpy(np.stack([_resized_cleanly(picture) for picture in pictures]))
        else:
            batch = torch.from_numpy(np.stack(pictures))
        pooled = self.network(batch.permute(0, 3, 1, 2).contiguous().to(self.device)).flatten(1).float()
        spatial = self.network.spatial if isinstance(self.network, RandomFeatures) else self._spatial
        # without the bias, as in ADM's suite and torch-fidelity
        classes = None if self.classes is None else (pooled @ self.classes.T).softmax(1)
        rows = None if spatial is None else spatial.permute(0, 2, 3, 1).flatten(1).float()
        return Features(*(None if part is None else part.cpu().numpy() for part in (pooled, rows, classes)))  # type: ignore[arg-type]  # pooled is there

    def all(self, pictures: Pictures, info: DistInfo, *, count: int | None = None) -> Features:
        """Features of all pictures, or of the first `count`, on every rank; each rank computes its share of batches."""
        total = len(pictures) if count is None else min(count, len(pictures))
        mine = [(first, self._batch(pictures, first, total)) for first in _shared(range(0, total, BATCH), info)]
        parts = sorted((pair for rank in gather_objects(mine) for pair in rank), key=lambda pair: pair[0])
        columns = list(zip(*(part for _, part in parts), strict=True))
        joined = [None if column[0] is None else np.concatenate(column) for column in columns]
        return Features(*joined)  # type: ignore[arg-type]  # pooled is there

    def _batch(self, pictures: Pictures, first: int, total: int) -> Features:
        batch = [pictures[index] for index in range(first, min(first + BATCH, total))]
        sizes = {picture.shape for picture in batch}
        if len(sizes) == 1:
            return self(batch)
        single = [self([picture]) for picture in batch]
        return Features(*(None if c[0] is None else np.concatenate(c) for c in zip(*single, strict=True)))  # type: ignore[arg-type]


def _shared(batches: range, info: DistInfo) -> Iterator[int]:
    return (first for number, first in enumerate(batches) if number % info.world == info.rank)


def _resized_cleanly(picture: np.ndarray) -> np.ndarray:
    """(299, 299, 3) float32 by Pillow's bicubic filter, each channel as floats, not rounded."""
    channels = [Image.fromarray(picture[..., channel].astype(np.float32)) for channel in range(3)]
    resized = [np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=-1).clip(0, 255)


# --- figures ----------------------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """What made pictures are compared with: moments of pooled and spatial features, and the features for precision."""

    name: str
    pooled: tuple[np.ndarray, np.ndarray]
    spatial: tuple[np.ndarray, np.ndarray] | None
    features: np.ndarray | None
    pictures: int | None


def reference_of(source: str | Path | Pictures, extractor: Extractor, info: DistInfo) -> Reference:
    """A folder or .npz of pictures, or ADM's reference .npz, which holds mu, sigma, mu_s, sigma_s and some pictures."""
    if not isinstance(source, Pictures) and Path(source).suffix == ".npz" and Path(source).is_file():
        held = _statistics_of(Path(source))
        if "mu" in held:
            with zipfile.ZipFile(source) as archive:
                has_pictures = "arr_0.npy" in archive.namelist()
            features = extractor.all(Pictures(source), info).pooled if has_pictures else None
            spatial = (held["mu_s"], held["sigma_s"]) if "mu_s" in held else None
            return Reference(str(source), (held["mu"], held["sigma"]), spatial, features, None)
    pictures = source if isinstance(source, Pictures) else Pictures(source)
    found = extractor.all(pictures, info)
    moments = None if found.spatial is None else _gaussian(found.spatial, pictures.name)
    return Reference(pictures.name, _gaussian(found.pooled, pictures.name), moments, found.pooled, len(pictures))


def _gaussian(features: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        return gaussian_of(features)
    except ValueError as error:
        raise UserError(f"{name}: a Frechet distance cannot be taken: {error}; give more pictures") from None


def figures(made: Features, reference: Reference) -> dict[str, Any]:
    """FID, sFID, KID, precision, recall and the Inception score of made pictures; those whose parts are there."""
    pooled = _gaussian(made.pooled, "the made pictures")
    for features, held in ((made.pooled, reference.pooled), (made.spatial, reference.spatial)):
        if features is not None and held is not None and features.shape[1] != len(held[0]):
            raise UserError(
                f"{reference.name}: holds statistics of {len(held[0])} features, the network gives {features.shape[1]}"
            )
    found: dict[str, Any] = {"fid": frechet_gaussians(*pooled, *reference.pooled)}
    if made.spatial is not None and reference.spatial is not None:
        found["sfid"] = frechet_gaussians(*gaussian_of(made.spatial), *reference.spatial)
    if made.classes is not None:
        found["inception_score"], found["inception_score_std"] = inception_score(made.classes)
    if reference.features is not None:
        found["kid"] = kernel_distance(made.pooled, reference.features)
        found["precision"], found["recall"] = precision_recall(made.pooled, reference.features)
    return found


def inception_score(classes_NK: np.ndarray, *, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL of class probabilities to their mean, over ten parts in order: mean and deviation."""
    scores = []
    for part in np.array_split(classes_NK.astype(np.float64), min(splits, len(classes_NK))):
        mean = part.mean(0, keepdims=True)
        scores.append(np.exp((part * (np.log(part.clip(1e-30)) - np.log(mean.clip(1e-30)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
