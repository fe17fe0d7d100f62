"""Path, losses, solvers, guidance, windows: by algebra."""

import pytest
import torch
from torch import nn

from float.rectified_flow import EarlyStopping, RectifiedFlow, RectifiedFlowLoss
from float.sampling.motion import SamplingOptions, guided_velocity, sample_motion, sample_windows
from shared.errors import UserError
from tests.float.golden import small_transformer


@pytest.mark.parametrize("sigmas", [(0.0, 1.0), (0.1, 1.0), (0.0, 2.0)])
def test_velocity_is_the_derivative_of_the_path(sigmas):
    flow = RectifiedFlow(sigma_min=sigmas[0], sigma_max=sigmas[1])
    noise, data = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    step = 1e-6
    slope = (flow.interpolate(noise, data, t + step) - flow.interpolate(noise, data, t - step)) / (2 * step)
    assert torch.allclose(slope, flow.target_velocity(noise, data), atol=1e-6)
    assert torch.allclose(flow.interpolate(noise, data, t * 0), sigmas[1] * noise)
    assert torch.allclose(flow.interpolate(noise, data, t * 0 + 1), data + sigmas[0] * noise)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("nfe", [2, 3, 10])
def test_a_constant_velocity_reaches_the_data_exactly(method, nfe):
    noise, data = torch.randn(2, 3, 4, 5)
    found = RectifiedFlow().sample_ode(lambda x, t: data - noise, noise, nfe=nfe, method=method)
    assert torch.allclose(found, data, atol=1e-5)


def test_nfe_counts_points_and_steps_count_steps():
    calls = []

    def velocity(x, t):
        calls.append(round(t[0].item(), 4))
        return torch.zeros_like(x)

    RectifiedFlow().sample_ode(velocity, torch.zeros(1, 2, 3), nfe=10)
    assert calls == [round(k / 9, 4) for k in range(9)]
    calls.clear()
    RectifiedFlow().sample_ode(velocity, torch.zeros(1, 2, 3), nfe=10, steps=4)
    assert calls == [0.0, 0.25, 0.5, 0.75]
    with pytest.raises(ValueError, match="at least 2"):
        RectifiedFlow().sample_ode(velocity, torch.zeros(1, 2, 3), nfe=1)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_solvers_have_their_order(method, order):
    start = torch.ones(1, 1, dtype=torch.float64)
    errors = [
        abs(RectifiedFlow().sample_ode(lambda x, t: -x, start, steps=steps, method=method).item() - torch.e**-1)
        for steps in (8, 16)
    ]
    assert 0.8 * 2**order < errors[0] / errors[1] < 1.3 * 2**order


def test_the_adaptive_method_needs_no_package_and_others_say_what_to_install():
    def solve(method):
        return RectifiedFlow().sample_ode(lambda x, t: -x, torch.ones(1, 1), method=method)

    assert abs(solve("dopri5").item() - torch.e**-1) < 1e-4
    if __import__("importlib.util").util.find_spec("torchdiffeq"):
        assert abs(solve("dopri8").item() - torch.e**-1) < 1e-4
    else:
        with pytest.raises(UserError, match="torchdiffeq"):
            solve("dopri8")


@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
def test_losses_by_hand(kind):
    output, target, previous = torch.randn(3, 7, 4), torch.randn(3, 5, 4), torch.randn(3, 2, 4)
    distance = {
        "mse": lambda a: a.square(),
        "l1": torch.abs,
        "huber": lambda a: torch.where(a.abs() < 1, a.square() / 2, a.abs() - 0.5),
    }[kind]
    valid = torch.tensor([True, False, True])
    terms = RectifiedFlowLoss(kind, lambda_ot=2.0, lambda_vel=3.0, prev_loss_weight=4.0)(
        output, target, prev_target=previous, prev_valid_B=valid
    )
    difference = output[:, 2:] - target
    flow = distance(difference).mean()
    velocity = distance(difference[:, 1:] - difference[:, :-1]).mean()
    prev = distance(output[:, :2] - previous).flatten(1).mean(1)[valid].mean()  # of the rows that count alone
    assert torch.allclose(terms["loss"], 2 * flow + 3 * velocity + 4 * prev, atol=1e-6)


def test_a_module_of_ones_own_is_a_loss():
    class CustomLoss(nn.Module):
        def forward(self, model_output, target):
            return (model_output - target).abs().max()

    terms = RectifiedFlowLoss(CustomLoss(), lambda_vel=0.0)(torch.zeros(2, 3, 4), torch.full((2, 3, 4), 5.0))
    assert terms["loss"] == 5
    with pytest.raises(ValueError, match="mse, l1, huber"):
        RectifiedFlowLoss("cosine")


def test_guidance_is_the_stated_combination():
    v_u, v_a, v_all, v_0 = 1.0, 2.0, 4.0, 0.5

    def model(t, x, wa, wr, we, prev_x, prev_wa):
        sound, emotion, reference = (value.flatten(1).abs().sum(1) > 0 for value in (wa, we, wr))
        value = torch.where(sound & emotion, v_all, torch.where(sound, v_a, torch.where(reference, v_u, v_0)))
        return value[:, None, None].expand(-1, 8, 3)

    arguments = [
        torch.zeros(2),
        torch.ones(2, 6, 3),
        torch.ones(2, 6, 4),
        torch.ones(2, 3),
        torch.ones(2, 1, 7),
        torch.ones(2, 2, 3),
        torch.ones(2, 2, 4),
    ]
    plain = guided_velocity(model, *arguments, SamplingOptions(a_cfg_scale=2, e_cfg_scale=3))
    assert torch.allclose(plain, torch.full_like(plain, v_u + 2 * (v_a - v_u) + 3 * (v_all - v_a)))
    both = guided_velocity(
        model, *arguments, SamplingOptions(a_cfg_scale=2, r_cfg_scale=4, e_cfg_scale=3, reference_guidance=True)
    )
    assert torch.allclose(both, plain - v_u + v_0 + 4 * (v_u - v_0))


@pytest.mark.parametrize(
    "scales,counted",
    [
        ({}, 3),  # the released ones: a 2, e 1
        ({"a_cfg_scale": 1}, 1),
        ({"a_cfg_scale": 2, "e_cfg_scale": 2}, 2),
        ({"a_cfg_scale": 1, "e_cfg_scale": 0}, 1),
        ({"r_cfg_scale": 3, "reference_guidance": True}, 4),
        ({"r_cfg_scale": 1, "reference_guidance": True}, 3),
    ],
)
def test_a_pass_that_counts_nothing_is_not_computed(scales, counted):
    asked = []

    class Model:
        def velocities(self, t_B, *inputs, passes):
            asked.extend(passes)
            return torch.ones(len(passes), 1, 6, 3)

    found = guided_velocity(Model(), *[torch.ones(1, 1, 3)] * 7, SamplingOptions(**scales))
    assert len(asked) == len(set(asked)) == counted
    assert torch.allclose(found, torch.ones(1, 6, 3))  # the weights of all passes add up to one


def test_early_stopping_waits_for_a_gain_of_min_delta():
    stop = EarlyStopping(patience=2, min_delta=0.1)
    assert [stop(loss) for loss in (1.0, 0.95, 0.8, 0.75, 0.72, 0.5)] == [False, False, False, False, True, False]


def _sample(model, frames, **changes):
    torch.manual_seed(frames)
    wa, wr, we = torch.randn(1, frames, 6), torch.randn(1, 8), torch.rand(1, 1, 7)
    options = SamplingOptions(nfe=3, **changes)
    return sample_motion(model, wa, wr, we, num_frames=6, num_prev_frames=2, options=options), (wa, wr, we, options)


@pytest.mark.parametrize("frames", [1, 5, 6, 7, 20])
def test_any_length_gives_as_many_frames(frames):
    found, _ = _sample(small_transformer(), frames)
    assert found.shape == (1, frames, 8) and torch.isfinite(found).all()


def test_two_windows_equal_two_calls_by_hand():
    model = small_transformer()
    found, (wa, wr, we, options) = _sample(model, 12)
    generator = torch.Generator().manual_seed(options.seed)
    noise = [torch.randn(1, 6, 8, generator=generator) for _ in range(2)]

    def window(noise, wa, prev_x, prev_wa):
        def velocity(x, t):
            return guided_velocity(model, t, x, wa, wr, we, prev_x, prev_wa, options)[:, 2:]

        return RectifiedFlow().sample_ode(velocity, noise, nfe=3)

    with torch.no_grad():
        first = window(noise[0], wa[:, :6], torch.zeros(1, 2, 8), torch.zeros(1, 2, 6))
        second = window(noise[1], wa[:, 6:], first[:, -2:], wa[:, 4:6])
    assert torch.allclose(found, torch.cat([first, second], 1), atol=1e-6)


def test_the_seed_decides_and_the_fixed_noise_repeats():
    model = small_transformer()
    assert torch.equal(_sample(model, 12, seed=1)[0], _sample(model, 12, seed=1)[0])
    assert not torch.equal(_sample(model, 12, seed=1)[0], _sample(model, 12, seed=2)[0])

    def zero(t, x, *_):
        return torch.zeros(len(x), 8, 8)

    fixed = _sample(zero, 12, fix_noise_seed=True)[0]
    assert torch.equal(fixed[:, :6], fixed[:, 6:])


def test_windows_are_made_one_at_a_time():
    asked = []

    def sound():
        for index in range(1000):
            asked.append(index)
            yield torch.randn(1, 6, 6)

    windows = sample_windows(
        small_transformer(),
        sound(),
        torch.randn(1, 8),
        torch.rand(1, 1, 7),
        num_frames=6,
        num_prev_frames=2,
        options=SamplingOptions(nfe=2),
    )
    next(windows)
    next(windows)
    assert asked == [0, 1]
