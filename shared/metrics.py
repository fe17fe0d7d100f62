"""Measures that several systems report."""

import numpy as np


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
