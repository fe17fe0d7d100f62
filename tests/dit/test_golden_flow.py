"""Paths, losses and samplers of the flow objective against golden numbers of the public SiT, and algebra."""

import pytest
import torch

from dit.config import FlowConfig
from dit.objective import FlowObjective
from dit.sampling.samplers import guide, sample_flow
from shared.flow import integrate
from tests.dit.golden import assert_close, cases, golden_model


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


def test_path_and_loss_equal_the_reference(sit):
    golden, _, velocity = sit
    t, noise, data = golden["t"], golden["x0_noise"], golden["x1_data"]
    objective = FlowObjective(FlowConfig(), latent_size=data[0].numel())
    x_t = objective.noisy(data, noise, t)
    assert_close(x_t, golden["path.Linear.x_t"])
    assert_close(data - noise, golden["path.Linear.u_t"])
    output = velocity(x_t, t)
    assert_close(output, golden["path.Linear.model_velocity"])
    assert_close(objective.error(output, x_t, data, noise, t), golden["loss.Linear.velocity"])


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "rk4"])
@pytest.mark.parametrize("points", [6, 11])
def test_ode_samples_equal_the_reference(sit, method, points):
    golden, _, velocity = sit
    name = {"heun": "heun2"}.get(method, method)
    found = sample_flow(velocity, golden["x0_noise"], method=method, steps=points - 1)
    assert_close(found, golden[f"ode.{name}.points{points}.out"], 1e-4)


def test_adaptive_sample_equals_the_reference(sit):
    golden, _, velocity = sit
    assert_close(sample_flow(velocity, golden["x0_noise"], method="dopri5"), golden["ode.dopri5.out"], 1e-3)


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
