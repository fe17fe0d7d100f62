"""Paths, losses and samplers of the flow objective against golden numbers of the public SiT, and algebra."""

import pytest
import torch

from dit.config import FlowConfig
from dit.objective import FlowObjective
from dit.sampling import paths
from dit.sampling.samplers import dopri5, guide, sample_flow
from shared.flow import integrate
from tests.dit.golden import assert_close, cases, golden_model

NAMES = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}


@pytest.fixture(scope="module")
def sit():
    golden, model = cases("sit"), golden_model()

    def velocity(x, t_B):
        with torch.no_grad():
            return model(x, t_B, labels=golden["y"])[:, :4]

    return golden, model, velocity


def test_forward_equals_the_reference(sit):
    golden, _, velocity = sit
    assert_close(velocity(golden["x1_data"], golden["t"]), golden["forward.out"])


@pytest.mark.parametrize("path", list(NAMES))
def test_paths_and_conversions_equal_the_reference(sit, path):
    golden, _, velocity = sit
    name, t = NAMES[path], golden["t"]
    x_t, u_t = paths.interpolate(path, golden["x0_noise"], golden["x1_data"], t)
    assert_close(x_t, golden[f"path.{name}.x_t"])
    assert_close(u_t, golden[f"path.{name}.u_t"])
    found = velocity(x_t, t)
    assert_close(found, golden[f"path.{name}.model_velocity"])
    assert_close(paths.score_from_velocity(path, found, x_t, t), golden[f"path.{name}.score_from_velocity"])
    assert_close(paths.noise_from_velocity(path, found, x_t, t), golden[f"path.{name}.noise_from_velocity"])


@pytest.mark.parametrize("path", list(NAMES))
def test_losses_equal_the_reference(sit, path):
    golden, _, velocity = sit
    t, noise = golden["t"], golden["x0_noise"]
    x_t, u_t = paths.interpolate(path, noise, golden["x1_data"], t)
    output = velocity(x_t, t)
    assert_close(
        paths.squared_error(path, "velocity", output, x_t, u_t, noise, t), golden[f"loss.{NAMES[path]}.velocity"]
    )
    for prediction in ("noise", "score"):
        for weighting in ("none", "velocity", "likelihood"):
            found = paths.squared_error(path, prediction, output, x_t, u_t, noise, t, weighting=weighting)
            assert_close(found, golden[f"loss.{NAMES[path]}.{prediction}.{weighting}"])


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "rk4"])
@pytest.mark.parametrize("points", [6, 11])
def test_ode_samples_equal_the_reference(sit, method, points):
    golden, _, velocity = sit
    name = {"heun": "heun2"}.get(method, method)
    found = sample_flow(velocity, golden["x0_noise"], method=method, steps=points - 1)
    assert_close(found, golden[f"ode.{name}.points{points}.out"], 1e-4)


def test_adaptive_sample_equals_the_reference(sit):
    golden, _, velocity = sit
    assert_close(dopri5(velocity, golden["x0_noise"]), golden["ode.dopri5.out"], 1e-3)


def test_guided_sample_equals_the_reference(sit):
    golden, model, _ = sit
    y, null = golden["y"], torch.full_like(golden["y"], 10)

    def predict(x, t_B):
        with torch.no_grad():
            return guide(
                lambda latent, time, labels: model(latent, time, labels=labels)[:, :4],
                x,
                t_B,
                {"labels": y},
                {"labels": null},
                4.0,
                channels=3,
            )

    assert_close(sample_flow(predict, golden["x0_noise"], method="euler", steps=5), golden["ode.euler.cfg.out"], 1e-4)


def test_sde_sample_equals_the_reference(sit):
    golden, _, velocity = sit
    found = sample_flow(velocity, golden["x0_noise"], method="sde", steps=6, draw=lambda k: golden["sde.step_noise"][k])
    assert_close(found, golden["sde.euler_maruyama.sigma.out"], 1e-4)


def test_shifted_flow_of_diffusers_is_ours_run_backwards():
    golden = cases("diffusers_schedulers")
    mix = golden["toy_model.channel_mix"]

    def velocity(x, t_B):  # theirs points to the noise and runs in sigma = 1 - t
        time = 1000 * (1 - t_B[:, None, None, None])
        return -torch.einsum("oc,bchw->bohw", mix, x) * (1 + time / 1000)

    sigmas = golden["sample.flow_euler.sigmas"].double()
    assert_close(
        integrate(velocity, golden["noise"], 1 - sigmas, method="euler"), golden["sample.flow_euler.out"], 1e-4
    )


@pytest.mark.parametrize("path", list(NAMES))
def test_velocity_is_the_derivative_of_the_path(path):
    noise, data = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t, step = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64), 1e-6
    ahead, behind = (paths.interpolate(path, noise, data, t + d)[0] for d in (step, -step))
    assert_close(paths.interpolate(path, noise, data, t)[1], (ahead - behind) / (2 * step), 1e-6)


@pytest.mark.parametrize("path", list(NAMES))
def test_every_prediction_means_the_same_velocity(path):
    noise, data = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    x_t, velocity = paths.interpolate(path, noise, data, t)
    sigma = paths.coefficients(path, t).sigma[:, None]
    for prediction, output in {"noise": noise, "score": -noise / sigma, "clean": data, "velocity": velocity}.items():
        assert_close(paths.to_velocity(path, prediction, output, x_t, t), velocity, 1e-9)
    assert_close(paths.clean_from_velocity(path, velocity, x_t, t), data, 1e-9)
    assert_close(paths.noise_from_velocity(path, velocity, x_t, t), noise, 1e-9)


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
def test_a_perfect_model_has_no_error_and_samples_the_data(prediction):
    objective = FlowObjective(FlowConfig(prediction=prediction), latent_size=12)
    noise, data = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    t = objective.times(torch.rand(5)).clamp_max(0.9)
    output = data if prediction == "clean" else data - noise
    noisy = objective.noisy(data, noise, t)
    assert objective.error(output, noisy, data, noise, t).max() < 1e-9
    assert_close(objective.clean(output, noisy, t), data)
    found = objective.sample(lambda x, t_B: output, noise, method="euler", steps=7)
    assert_close(found, data, 1e-4)


def test_shift_moves_times_towards_the_noise_by_the_formula():
    uniform = torch.rand(100)
    plain, shifted = (FlowObjective(FlowConfig(shift=s), latent_size=4096).times(uniform) for s in (1.0, 3.0))
    assert_close(shifted, plain / (3 - 2 * plain))
    assert FlowObjective(FlowConfig(shift="auto"), latent_size=4 * 64 * 64).shift == 2.0
