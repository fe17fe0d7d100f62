"""The Frechet distance against cases worked out by hand."""

import numpy as np
import pytest

from shared.metrics import frechet_gaussians, gaussian_of


def test_gaussians_with_known_distances():
    mean, spread = np.zeros(3), np.diag([1.0, 4.0, 9.0])
    assert frechet_gaussians(mean, spread, mean, spread) == pytest.approx(0, abs=1e-9)
    assert frechet_gaussians(mean, spread, mean + 2, spread) == pytest.approx(12)
    assert frechet_gaussians(mean, spread, mean, 4 * spread) == pytest.approx(1 + 4 + 9)
    assert frechet_gaussians(mean, spread, mean, spread[::-1, ::-1]) == pytest.approx(2 * (3 - 1) ** 2)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = [rotation @ matrix @ rotation.T for matrix in (spread, 4 * spread)]
    assert frechet_gaussians(mean, turned[0], mean, turned[1]) == pytest.approx(14)


def test_covariances_of_low_rank_stay_finite():
    rows = np.random.default_rng(0).normal(size=(5, 40))
    assert frechet_gaussians(*gaussian_of(rows), *gaussian_of(rows + 1)) == pytest.approx(40, rel=1e-6)


def test_one_feature_and_bad_rows():
    mean, covariance = gaussian_of(np.array([[0.0], [2.0]]))
    assert mean.tolist() == [1.0] and covariance.tolist() == [[2.0]]
    for wrong, message in ((np.zeros((1, 3)), "at least 2"), (np.full((2, 2), np.nan), "finite")):
        with pytest.raises(ValueError, match=message):
            gaussian_of(wrong)
