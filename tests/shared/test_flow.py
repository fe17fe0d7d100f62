"""Paths, times and solvers, by algebra: B batch, then any."""

import math
from functools import partial

import pytest
import torch

from shared.errors import UserError
from shared.flow import (
    FIXED_GRID,
    check_solver,
    drop_per_sample,
    guided,
    integrate,
    linear_path,
    sample_times,
    shift_noise_level,
    time_grid,
)

SHAPES = [(5,), (5, 3), (5, 2, 4, 4)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- path -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_velocity_is_the_finite_difference_of_the_path(shape):
    start, end = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    t_B, small = torch.rand(5, dtype=torch.float64), 1e-6
    _, velocity = linear_path(start, end, t_B)
    after, before = linear_path(start, end, t_B + small)[0], linear_path(start, end, t_B - small)[0]
    assert torch.allclose((after - before) / (2 * small), velocity, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_path_joins_its_ends_sample_by_sample(shape):
    start, end = torch.randn(shape), torch.randn(shape)
    t_B = torch.tensor([0.0, 1.0, 0.5, 0.25, 1.0])
    x_t, velocity = linear_path(start, end, t_B)
    assert x_t.shape == velocity.shape == shape and x_t.dtype == torch.float32
    assert torch.equal(x_t[0], start[0]) and torch.equal(x_t[1], end[1]) and torch.equal(x_t[4], end[4])
    assert torch.allclose(x_t[2], (start[2] + end[2]) / 2) and torch.allclose(x_t[3], 0.75 * start[3] + 0.25 * end[3])


def test_both_conventions_of_time_are_one_path():
    data, noise, t_B = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    x_t, velocity = linear_path(noise, data, t_B)
    mirrored, against = linear_path(data, noise, 1 - t_B)
    assert torch.allclose(x_t, mirrored, atol=1e-6) and torch.equal(velocity, -against)


# --- times ------------------------------------------------------------------------------------------------------------


def test_logit_normal_times_have_the_quantiles_of_the_distribution():
    uniform = torch.linspace(0, 1, 20001)[:-1] + 0.5 / 20000
    for mean, std in [(0.0, 1.0), (0.5, 0.7), (-1.0, 2.0)]:
        times = sample_times("logit_normal", uniform, mean=mean, std=std)
        assert times.dtype == uniform.dtype and 0 < times.min() and times.max() < 1
        for share, normal in [(0.5, 0.0), (0.841345, 1.0), (0.022750, -2.0), (0.9, 1.281552)]:
            expected = 1 / (1 + math.exp(-(mean + std * normal)))
            assert times.quantile(share).item() == pytest.approx(expected, abs=2e-4)


def test_uniform_times_are_the_draws_and_the_ends_are_finite():
    draws = torch.tensor([0.0, 0.3, 1 - 2**-24])
    assert torch.equal(sample_times("uniform", draws), draws)
    assert sample_times("logit_normal", draws).isfinite().all()
    with pytest.raises(ValueError, match="logit-normal"):
        sample_times("logit-normal", draws)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 12.0])
def test_shift_is_monotone_with_fixed_ends(shift):
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    moved = shift_noise_level(sigma, shift)
    assert moved[0] == 0 and moved[-1] == pytest.approx(1) and (moved.diff() > 0).all()
    inner = moved[1:-1] - sigma[1:-1]
    assert (inner > 0).all() if shift > 1 else (inner < 0).all() if shift < 1 else torch.allclose(moved, sigma)
    assert torch.allclose(shift_noise_level(moved, 1 / shift), sigma)  # the inverse


def test_the_grid_is_dense_at_the_noisy_end():
    plain = time_grid(4)
    assert plain.tolist() == [0, 0.25, 0.5, 0.75, 1] and plain.dtype == torch.float64
    at_start, at_end = time_grid(8, shift=3.0), time_grid(8, shift=3.0, noise_at="end")
    for grid in (at_start, at_end):
        assert len(grid) == 9 and grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()
    assert at_start.diff()[0] < 1 / 8 < at_start.diff()[-1] and at_end.diff()[-1] < 1 / 8 < at_end.diff()[0]
    assert torch.allclose(at_start, 1 - at_end.flip(0))
    down = time_grid(8, start=1.0, end=0.0, shift=3.0)
    assert torch.allclose(down, 1 - at_start)
    with pytest.raises(ValueError, match="steps is 0"):
        time_grid(0)


# --- solvers ----------------------------------------------------------------------------------------------------------


def constant_velocity(x, t_B, value):
    return value


@pytest.mark.parametrize("method", [*FIXED_GRID, "dopri5"])
@pytest.mark.parametrize("steps", [1, 7])
def test_constant_velocity_is_solved_exactly(method, steps):
    start, end = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    field = partial(constant_velocity, value=end - start)
    assert torch.allclose(integrate(field, start, time_grid(steps, shift=2.0), method), end, atol=1e-12)
    back = integrate(field, end, time_grid(steps, start=1.0, end=0.0), method)
    assert torch.allclose(back, start, atol=1e-12)


def error_after(method, steps, start_time=0.0, end_time=1.0):
    """Largest error on dx/dt = (1 + t) x, whose solution is x(0) exp(t + t^2 / 2)."""
    solution = lambda t: torch.tensor([[1.0], [2.0]], dtype=torch.float64) * math.exp(t + t * t / 2)  # noqa: E731
    field = lambda x, t_B: x * (1 + t_B)[:, None]  # noqa: E731
    found = integrate(field, solution(start_time), time_grid(steps, start=start_time, end=end_time), method)
    return (found - solution(end_time)).abs().max().item()


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_order_of_the_solvers(method, order, ends):
    errors = [error_after(method, steps, *ends) for steps in (32, 64, 128)]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.08)


@pytest.mark.parametrize("method", ["heun", "midpoint", "rk4", "dopri5"])
def test_there_and_back_again(method):
    def field(x, t_B):
        return torch.sin(x) + t_B[:, None]

    start = torch.randn(4, 3, dtype=torch.float64)
    there = integrate(field, start, time_grid(100), method)
    assert (there - start).abs().max() > 1
    assert torch.allclose(integrate(field, there, time_grid(100, start=1.0, end=0.0), method), start, atol=1e-4)


def test_the_model_sees_one_time_per_sample_in_its_own_type():
    seen = []

    def field(x, t_B):
        seen.append(t_B)
        return torch.zeros_like(x)

    start = torch.randn(4, 2)
    assert torch.equal(integrate(field, start, time_grid(2), "heun"), start)
    assert all(t_B.shape == (4,) and t_B.dtype == torch.float32 for t_B in seen)
    assert [t_B[0].item() for t_B in seen] == [0.0, 0.5, 0.5, 1.0]


def test_what_cannot_be_solved_is_refused():
    start = torch.zeros(1, 1)
    for times in ([0.0], [], [0.0, 0.5, 0.5, 1.0], [0.0, 0.6, 0.4, 1.0]):
        with pytest.raises(ValueError, match="monotone"):
            integrate(torch.ones_like, start, torch.tensor(times))
    for attempt in (lambda: integrate(torch.ones_like, start, time_grid(2), "rk45"), lambda: check_solver("rk45")):
        with pytest.raises(UserError, match="'rk45' is .*euler, heun, midpoint, rk4 or dopri5"):
            attempt()
    with pytest.raises(UserError, match="more than 1000 steps .*larger tolerances"):
        integrate(lambda x, t_B: torch.sin(1e6 * t_B)[:, None], start, time_grid(1), "dopri5", atol=1e-12, rtol=0.0)


def test_rk4_is_the_three_eighths_rule_by_hand():
    """One step of dx/dt = t^4 from 0 to 1 is the rule's quadrature: (0 + 3/81 + 3 * 16/81 + 1) / 8."""
    found = integrate(lambda x, t_B: (t_B**4)[:, None], torch.zeros(1, 1, dtype=torch.float64), time_grid(1), "rk4")
    assert found.item() == pytest.approx((3 / 81 + 48 / 81 + 1) / 8)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (-2.0, 3.0)])
def test_adaptive_steps_hold_the_tolerance(ends):
    """dx/dt = 3 cos(3 t) has the solution sin(3 t); a tighter tolerance takes more evaluations and errs less."""
    calls: list[int] = []

    def field(x, t_B):
        calls.append(1)
        return 3 * torch.cos(3 * t_B)[:, None].expand_as(x)

    start, end = (math.sin(3 * t) for t in ends)
    errors, counts = [], []
    for tolerance in (1e-3, 1e-6, 1e-9):
        calls.clear()
        grid = torch.tensor(ends, dtype=torch.float64)
        found = integrate(
            field, torch.full((2, 1), start, dtype=torch.float64), grid, "dopri5", atol=tolerance, rtol=tolerance
        )
        errors.append((found - end).abs().max().item())
        counts.append(len(calls))
        assert errors[-1] < 20 * tolerance and len(calls) % 6 == 1  # six new slopes a step, the seventh is kept
    assert errors[0] > errors[2] and counts[0] < counts[2]


def test_the_solvers_agree_with_those_of_torchdiffeq():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    start = torch.randn(4, 3, dtype=torch.float64)
    cases = {
        "euler": "euler",
        "heun": "heun2",
        "midpoint": "midpoint",
        "rk4": "rk4",
        "dopri5": "dopri5",
        "bosh3": "bosh3",
    }
    for own, theirs in cases.items():
        found = integrate(lambda x, t_B: torch.sin(x) + t_B[:, None], start, time_grid(4), own, atol=1e-9, rtol=1e-9)
        expected = torchdiffeq.odeint(lambda t, x: torch.sin(x) + t, start, time_grid(4), method=theirs, rtol=1e-9)[-1]
        assert torch.allclose(found, expected, atol=1e-7 if own == "dopri5" else 1e-12), own


# --- conditions -------------------------------------------------------------------------------------------------------


def test_dropout_touches_the_chosen_rows_and_no_other():
    condition_BLD, null_LD = torch.randn(5, 4, 3), torch.randn(4, 3)
    drop_B = torch.tensor([True, False, False, True, False])
    dropped = drop_per_sample(condition_BLD, null_LD, drop_B)
    assert torch.equal(dropped[drop_B], null_LD.expand(2, 4, 3))
    assert torch.equal(dropped[~drop_B], condition_BLD[~drop_B])
    labels = drop_per_sample(torch.arange(5), torch.tensor(99), drop_B)
    assert labels.tolist() == [99, 1, 2, 99, 4]


def test_a_dropped_row_passes_its_gradient_to_the_null():
    condition, null = torch.randn(3, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    drop_per_sample(condition, null, torch.tensor([True, False, True])).sum().backward()
    assert condition.grad[:, 0].tolist() == [0, 1, 0] and null.grad.tolist() == [2, 2]


def test_guidance_runs_through_both_predictions():
    conditional, unconditional = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.allclose(guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(guided(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional, atol=1e-6)
