"""The noise objective against golden numbers of the public DiT's diffusion and of diffusers."""

import pytest
import torch

from dit.config import DiffusionConfig
from dit.objective import NoiseObjective
from dit.sampling.gaussian import GaussianDiffusion, kept_timesteps
from dit.sampling.samplers import guide, make_sampler, sample_noise
from shared.errors import UserError
from tests.dit.golden import MANIFEST, assert_close, cases, golden_model

LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SETTINGS = {
    "linear": {"noise_scheduler": "linear"},
    "scaled_linear": {},
    "squaredcos_cap_v2": {"noise_scheduler": "squaredcos_cap_v2"},
    "scaled_linear_zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


def objective(name: str = "scaled_linear", **options) -> NoiseObjective:
    return NoiseObjective(DiffusionConfig(**{**SETTINGS[name], **options}))


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_tables_equal_the_reference(name):
    golden = cases("gaussian_diffusion")
    diffusion = GaussianDiffusion(golden[f"schedule.{name}.betas"])
    checked = 0
    for key, expected in golden.items():
        if key.startswith(f"schedule.{name}."):
            assert_close(getattr(diffusion, key.rsplit(".", 1)[1]), expected, 1e-6)
            checked += 1
    assert checked >= 2


def test_betas_of_diffusers_are_the_official_ones():
    golden = cases("gaussian_diffusion")
    assert_close(LINEAR, golden["schedule.linear.betas"], 1e-12)
    for name in ("linear", "squaredcos_cap_v2"):
        assert_close(objective(name).alphas_cumprod, golden[f"schedule.{name}.alphas_cumprod"], 1e-5)


def test_respacing_keeps_the_reference_steps():
    for text, steps in MANIFEST["space_timesteps"].items():
        if text.isdecimal():  # the other forms, of parts and of DDIM, are not offered
            assert kept_timesteps(1000, int(text)) == steps


@pytest.mark.parametrize("variant", ["learn_sigma", "fixed_sigma"])
@pytest.mark.parametrize("target", ["eps", "xstart"])
def test_losses_equal_the_reference(variant, target):
    golden, model = cases("gaussian_diffusion"), golden_model(learn_sigma=variant == "learn_sigma")
    kind = {"eps": "epsilon", "xstart": "sample"}[target]
    noise_objective = NoiseObjective(
        DiffusionConfig(noise_scheduler="linear", prediction_type=kind), learn_sigma=variant == "learn_sigma"
    )
    x0, noise, t = golden["x0"], golden["noise"], golden["t"]
    diffusion = GaussianDiffusion(LINEAR)
    x_t = golden["x_t"]
    assert_close(noise_objective.noisy(x0, noise, t), x_t)
    with torch.no_grad():
        output = model(x_t, t, labels=golden["y"])
    mse = (output[:, :4] - noise_objective.target(x0, noise, t)).square().flatten(1).mean(1)
    assert_close(mse, golden[f"loss.{variant}.{target}.mse"])
    assert_close(noise_objective.error(output, x_t, x0, noise, t), golden[f"loss.{variant}.{target}.loss"])
    if variant == "learn_sigma":
        assert_close(
            diffusion.variational_bound(output, x0, x_t, t, target=kind), golden[f"loss.{variant}.{target}.vb"]
        )


@pytest.mark.parametrize("variant", ["learn_sigma", "fixed_sigma"])
def test_moments_equal_the_reference(variant):
    golden, model = cases("gaussian_diffusion"), golden_model(learn_sigma=variant == "learn_sigma")
    diffusion = GaussianDiffusion(LINEAR)
    with torch.no_grad():
        found = diffusion.moments(model(golden["x_t"], golden["t"], labels=golden["y"]), golden["x_t"], golden["t"])
    names = {
        "mean": found.mean,
        "variance": found.variance,
        "log_variance": found.log_variance,
        "pred_xstart": found.clean,
    }
    for name, value in names.items():
        assert_close(value, golden[f"p_mean_variance.{variant}.{name}"])


@pytest.mark.parametrize("variant", ["learn_sigma", "fixed_sigma"])
def test_respaced_samples_equal_the_reference(variant):
    golden, model = cases("gaussian_diffusion"), golden_model(learn_sigma=variant == "learn_sigma")

    def predict(x, t_B):
        return model(x, t_B, labels=golden["y"])

    with torch.no_grad():
        draws = golden[f"ddpm.{variant}.step_noise"]
        ancestral = sample_noise(
            predict,
            golden["noise"],
            dict(objective("linear").noise_scheduler.config),
            method="ddpm",
            steps=5,
            draw=lambda k: draws[k],
        )
        assert_close(ancestral, golden[f"ddpm.{variant}.out"], 1e-4)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_schedules_of_diffusers_equal_the_reference(name):
    golden = cases("diffusers_schedulers")
    x0, noise, t = golden["x0"], golden["noise"], golden["t"]
    plain = objective(name)
    assert_close(plain.alphas_cumprod, golden[f"{name}.alphas_cumprod"], 1e-5)
    assert_close(plain.noisy(x0, noise, t), golden[f"{name}.add_noise"])
    v = objective(name, prediction_type="v_prediction", snr_gamma=5.0)
    assert_close(v.target(x0, noise, t), golden[f"{name}.velocity"])
    assert_close(v.min_snr_weight(t), golden[f"{name}.min_snr5_weight_v"])
    if name != "scaled_linear_zero_snr":
        assert_close(objective(name, snr_gamma=5.0).min_snr_weight(t), golden[f"{name}.min_snr5_weight_epsilon"])


@pytest.mark.parametrize("method", ["ddim", "dpmpp2m", "dpmpp2m_karras"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_samplers_of_diffusers_equal_the_reference(method, kind):
    golden, name = cases("diffusers_schedulers"), method.replace("dpmpp2m", "dpmpp_2m")
    noise_objective = objective(prediction_type=kind)
    mix = golden["toy_model.channel_mix"]

    def predict(x, t_B):
        return torch.einsum("oc,bchw->bohw", mix, x) * (1 + t_B[:, None, None, None] / 1000)

    scheduler = make_sampler(dict(noise_objective.noise_scheduler.config), name)
    scheduler.set_timesteps(10)
    assert_close(scheduler.timesteps.float(), golden[f"sample.{method}.{kind}.timesteps"])
    found = noise_objective.sample(predict, golden["noise"], method=name, steps=10)
    assert_close(found, golden[f"sample.{method}.{kind}.out"], 1e-4)


@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m", "ddpm"])
def test_more_steps_than_levels_are_refused(method):
    with pytest.raises(UserError, match="--steps 1001: the model was trained on 1000 levels"):
        objective().sample(lambda x, t_B: x, torch.zeros(1, 4, 2, 2), method=method, steps=1001)


def test_guidance_on_three_channels_is_the_public_habit():
    golden, model = cases("dit_forward"), golden_model()
    x, t, y = golden["full.x"], golden["full.t"], golden["full.y"]
    null = torch.full_like(y, 10)
    with torch.no_grad():
        found = guide(
            lambda latent, time, labels: model(latent, time, labels=labels),
            x,
            t,
            {"labels": y},
            {"labels": null},
            float(golden["cfg.scale"]),
            channels=3,
        )
    expected = golden["cfg.out_first3channels"]
    assert_close(found, expected[:3])
    assert_close(found[:, :3], expected[3:, :3])


def test_training_trace_equals_the_reference():
    golden, model = cases("train_trace"), golden_model()
    trace = MANIFEST["trace"]
    noise_objective = NoiseObjective(DiffusionConfig(noise_scheduler="linear"), learn_sigma=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=trace["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    losses, norms = [], []
    for step in range(trace["steps"]):
        x0, noise, t, y = (golden[name][step] for name in ("x0", "noise", "t", "y"))
        noisy = noise_objective.noisy(x0, noise, t)
        loss = noise_objective.error(model(noisy, t, labels=y), noisy, x0, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), trace["clip"]))
        optimizer.step()
        losses.append(loss.detach())
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - trace["ema"])
    assert_close(torch.stack(losses), golden["loss"], 1e-4)
    assert_close(torch.stack(norms), golden["grad_norm_before_clip"], 1e-4)
    weights = model.state_dict()
    # Adam divides by the gradient's size, so the last bit of the time sinusoids (see test_golden_model) shows:
    # 1.05e-4 seen.
    for key in (key for key in golden if key.startswith(("final.", "ema."))):
        kind, name = key.split(".", 1)
        assert_close((weights if kind == "final" else average)[name], golden[key], 2e-4)
