"""Evaluation formulas (FLOAT section 4.1): Frechet distance, identity similarity, lip-sync error, and proxies that
need no weights.

Features come from any extractor, as matrices (n, F). All sums in float64.
"""

import numpy as np

from float.modules.audio import SAMPLE_RATE
from shared.metrics import frechet_gaussians, gaussian_of

EPSILON = 1e-6
LSE_OFFSETS = 15  # frames to either side
LAGS = 5


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Frechet distance of two sets of features (n, F): FID on frames, FVD on clips, E-FID on expressions, P-FID on
    head poses.
    """
    gaussians = [gaussian_of(features) for features in (features_a, features_b)]
    widths = [len(mean) for mean, _ in gaussians]
    if widths[0] != widths[1]:
        raise ValueError(f"features are {widths[0]} and {widths[1]} wide; use one extractor for both")
    return frechet_gaussians(*gaussians[0], *gaussians[1])


def cosine_similarity(embeddings: np.ndarray, reference: np.ndarray) -> float:
    """CSIM: mean cosine of frame embeddings (n, F) with a source embedding (F,), or row by row with (n, F)."""
    embeddings, reference = np.asarray(embeddings, np.float64), np.asarray(reference, np.float64)
    dot = (embeddings * reference).sum(-1)
    norms = np.linalg.norm(embeddings, axis=-1) * np.linalg.norm(reference, axis=-1)
    return float(np.mean(dot / np.maximum(norms, 1e-12)))


def lip_sync_error(video: np.ndarray, audio: np.ndarray, *, offsets: int = LSE_OFFSETS) -> tuple[float, float, int]:
    """(LSE-D, LSE-C, offset) from SyncNet-like embeddings (n, F) of video and sound (Chung and Zisserman 2016).

    The distance of every video frame to the sound at offsets -15 .. 15 (the ends repeated) is averaged over frames;
    LSE-D is the least of these means, LSE-C their median minus it, offset where it lies (positive: the sound comes
    later).
    """
    video, audio = np.asarray(video, np.float64), np.asarray(audio, np.float64)
    count = min(len(video), len(audio))
    video, audio = video[:count], audio[:count]
    padded = np.pad(audio, ((offsets, offsets), (0, 0)))
    distances = np.stack(
        [np.linalg.norm(video - padded[shift : shift + count], axis=1) for shift in range(2 * offsets + 1)], 1
    )
    mean = distances.mean(0)
    best = int(mean.argmin())
    return float(mean[best]), float(np.median(mean) - mean[best]), best - offsets


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r over the common length; 0 where one of them does not change."""
    count = min(len(a), len(b))
    a, b = np.asarray(a[:count], np.float64), np.asarray(b[:count], np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 1e-12 else 0.0


def best_lag(made: np.ndarray, true: np.ndarray, *, lags: int = LAGS) -> tuple[int, float]:
    """(lag, r) of the best correlation; a positive lag means that `made` comes later than `true`."""
    return best_lag_of_clips([(made, true)], lags=lags)


def best_lag_of_clips(pairs: list[tuple[np.ndarray, np.ndarray]], *, lags: int = LAGS) -> tuple[int, float]:
    """best_lag over the frames of several clips (made, true) together, so that a clip in which nothing moves counts by
    as little as it moves.
    """
    found = {}
    for lag in range(-lags, lags + 1):
        made, true = zip(*(_shifted(*pair, lag) for pair in pairs), strict=True)
        if all(len(piece) >= 3 for piece in made):
            found[lag] = correlation(np.concatenate(made), np.concatenate(true))
    lag = max(found, key=lambda key: (found[key], -abs(key)))
    return lag, found[lag]


def _shifted(made: np.ndarray, true: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """What two curves have in common when `made` comes `lag` frames later."""
    count = min(len(made), len(true))
    return made[max(lag, 0) : count + min(lag, 0)], true[max(-lag, 0) : count - max(lag, 0)]


def log_energy(wave: np.ndarray, *, fps: float, frames: int) -> np.ndarray:
    """Log energy of the sound in each video frame, (frames,): what any mouth that follows loudness would do."""
    width = SAMPLE_RATE / fps
    padded = np.pad(wave, (0, max(0, int(np.ceil(frames * width)) - len(wave))))
    pieces = [padded[round(i * width) : round((i + 1) * width)] for i in range(frames)]
    return np.log(np.array([np.square(piece, dtype=np.float64).mean() for piece in pieces]) + 1e-7)


def mouth_activity(frames: np.ndarray, box: list[float]) -> np.ndarray:
    """How far the mouth of each frame is from its median look, (T,): a stand-in for opening that needs no training.

    frames: uint8 (T, S, S, 3); box: left, top, right, bottom as shares of the side.
    """
    side = frames.shape[1]
    left, top, right, bottom = (round(edge * side) for edge in box)
    mouth = frames[:, top:bottom, left:right].astype(np.float64)
    return np.abs(mouth - np.median(mouth, axis=0)).mean((1, 2, 3))
