"""The released modules' recorded outputs."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Wav2Vec2Config

from float.model import AudioProjection, FlowMatchingTransformer, TimestepEmbedder
from float.modules.audio import AudioEncoder, frames_of, pad_to_frames, rename_weight_norm, resample_features
from float.modules.autoencoder import MotionAutoencoder
from float.modules.emotion import Audio2Emotion
from float.modules.image_ops import (
    Blur,
    ConvLayer,
    EqualLinear,
    FusedLeakyReLU,
    ModulatedConv2d,
    ResBlock,
    Upsample,
    smoothing_kernel,
    upfirdn2d,
)
from float.rectified_flow import RectifiedFlowLoss
from float.sampling.motion import SamplingOptions, guided_velocity, sample_motion
from tests.float.golden import Case, formula_values, transformer_of

CONDITIONS = ("t", "x", "wa", "wr", "we", "prev_x", "prev_wa")


@pytest.fixture(params=["fmt_small", "fmt_mid"])
def fmt(request):
    case = Case(request.param)
    return case, transformer_of(case), [case.inputs[name] for name in CONDITIONS]


@torch.no_grad()
def test_transformer_agrees_in_every_way_of_calling(fmt):
    case, model, (t, x, wa, wr, we, prev_x, prev_wa) = fmt
    case.close(model(t, x, wa, wr, we, prev_x, prev_wa), "with_prev", 2e-5)
    case.close(model(t, x, wa, wr, we, torch.zeros_like(prev_x), torch.zeros_like(prev_wa)), "zero_prev", 2e-5)
    case.close(model(t, x, wa, wr, we), "zero_prev", 2e-5)
    case.close(model(t, torch.cat([prev_x, x], 1), torch.cat([prev_wa, wa], 1), wr, we), "no_prev_fullseq", 2e-5)
    case.close(model(t, x, wa * 0, wr, we, prev_x, prev_wa), "drop_audio", 2e-5)
    case.close(model(t, x, wa, wr * 0, we, prev_x, prev_wa), "drop_ref", 2e-5)
    case.close(model(t, x, wa, wr, we * 0, prev_x, prev_wa), "drop_emotion", 2e-5)
    case.close(model(t, x, wa * 0, wr * 0, we * 0, prev_x, prev_wa), "drop_all", 2e-5)
    keep = (
        1 - case.outputs["mask_prev_x"].float()[:, None, None],
        1 - case.outputs["mask_prev_wa"].float()[:, None, None],
    )
    case.close(model(t, x, wa, wr, we, prev_x * keep[0], prev_wa * keep[1]), "train_prev_dropout", 2e-5)


@torch.no_grad()
def test_transformer_tables_agree(fmt):
    case, model, (t, *_) = fmt
    fresh = FlowMatchingTransformer(
        dim_h=model.pos_embed.shape[2],
        num_heads=1,
        depth=1,
        num_frames=model.num_frames,
        num_prev_frames=model.num_prev_frames,
        attention_window=case.config["config"]["attention_window"],
    )
    case.close(fresh.pos_embed, "pos_embed", 0)
    assert torch.equal(fresh.alignment_mask, case.outputs["alignment_mask"].bool())
    case.close(TimestepEmbedder.frequencies(t), "t_freq", 1e-6)
    case.close(model.t_embedder(t), "t_emb", 2e-5)


@pytest.mark.parametrize(
    "name, scales",
    [("a2_e1", (2, 1, 1)), ("a2_e3", (2, 1, 3)), ("a1_e5", (1, 1, 5)), ("r2_only", (1, 2, 1)), ("111", (1, 1, 1))],
)
@torch.no_grad()
def test_guided_velocity_agrees(fmt, name, scales):
    case, model, (t, *rest) = fmt
    options = SamplingOptions(a_cfg_scale=scales[0], r_cfg_scale=scales[1], e_cfg_scale=scales[2])
    found = guided_velocity(model, t[:1].expand(len(t)), *rest, options)
    case.close(found, f"cfv_{name}", 1e-4)


def test_losses_and_gradients_agree(fmt):
    case, model, arguments = fmt
    terms = RectifiedFlowLoss("l1")(model(*arguments), case.inputs["target"])
    assert abs(terms["loss_flow"].item() - case.outputs["loss_ot"].item()) < 1e-6
    assert abs(terms["loss_vel"].item() - case.outputs["loss_vel"].item()) < 1e-6
    terms["loss"].backward()
    parameters = dict(model.named_parameters())
    for name in [name.removeprefix("grad.") for name in case.outputs if name.startswith("grad.")]:
        case.close(parameters[name].grad, f"grad.{name}", 1e-5)


@pytest.mark.parametrize("name", ["sample_euler", "sample_midpoint"])
def test_windowed_sampling_agrees(name):
    case = Case(name)
    config, scales = case.config, case.config["scales"]
    options = SamplingOptions(
        nfe=config["nfe"],
        method=config["ode_method"],
        a_cfg_scale=scales["a"],
        r_cfg_scale=scales["r"],
        e_cfg_scale=scales["e"],
    )
    found = sample_motion(
        transformer_of(case),
        case.inputs["wa"],
        case.inputs["wr"],
        case.inputs["we"],
        num_frames=config["L"],
        num_prev_frames=config["L_prev"],
        options=options,
        noise=iter(case.inputs["noise"]),
    )
    case.close(found, "sample", 1e-4)


@torch.no_grad()
def test_autoencoder_agrees():
    case = Case("autoencoder_64")
    config = case.config
    channels = {int(side): count for side, count in config["channels"].items()}
    model = MotionAutoencoder(config["size"], config["style_dim"], config["motion_dim"], channels)
    computed = [name for name, _ in model.named_buffers()]
    assert model.load_state_dict(case.weights, strict=False).unexpected_keys == []
    assert set(case.weights) | set(computed) >= set(model.state_dict())
    source, driving = case.inputs["source"], case.inputs["drive"]
    w, motion, features = model.encode_source(source)
    case.close(w, "w", 2e-5)
    case.close(model.enc.fc(w), "lambda", 2e-5)
    case.close(motion, "motion", 2e-5)
    case.close(model.encode_motion(driving), "motion_drive", 2e-5)
    case.close(model.dec.direction(None), "basis_Q", 2e-5)
    for index, feature in enumerate(features):
        case.close(feature, f"feat{index}", 5e-4)
    case.close(model(source, driving), "image_drive", 5e-4)
    case.close(model.decode(w, motion, features), "image_self", 5e-4)
    case.close(model.dec(w + model.encode_motion(driving), features)[1], "flow64_drive", 5e-4)
    target, start = model.enc.enc_motion(driving), model.enc.enc_motion(source.flip(-1))
    relative = model.dec.direction(target) - model.dec.direction(start) + motion  # the source, moved by the difference
    case.close(model.decode(w, relative, features), "image_relative", 5e-4)
    x = model.dec.conv1(model.dec.input(len(w)), w + motion)
    case.close(x, "dec_conv1", 5e-4)
    x = model.dec.convs[1](model.dec.convs[0](x, w + motion), w + motion)
    warped, merged, raw, grid = model.dec.to_flows[0](x, w + motion, features[0], None)
    for name, found in (("conv8", x), ("warp8", warped), ("merge8", merged), ("rawflow8", raw), ("grid8", grid)):
        case.close(found, f"dec_{name}", 5e-4)
    case.close(model.dec.to_rgbs[0](warped), "dec_rgb8", 5e-4)


def _loaded(module, case, name):
    weights = {key[len(name) + 1 :]: value for key, value in case.weights.items() if key.startswith(name + ".")}
    assert module.load_state_dict(weights, strict=False).unexpected_keys == []
    return module


@torch.no_grad()
def test_image_operators_agree():
    case = Case("image_ops")
    x, kernel = case.inputs["upfirdn_x"], case.inputs["upfirdn_k"]
    tolerance = 1e-5
    case.close(smoothing_kernel(), "make_kernel_1331", tolerance)
    case.close(upfirdn2d(x, kernel, up=2, pad=(2, 1)), "upfirdn_up2_down1_pad21", tolerance)
    case.close(upfirdn2d(x, kernel, down=2, pad=(1, 1)), "upfirdn_up1_down2_pad11", tolerance)
    case.close(upfirdn2d(x, kernel, up=2, down=2), "upfirdn_up2_down2_pad00", tolerance)
    case.close(Blur((2, 2))(x), "blur_pad22", tolerance)
    case.close(Blur((1, 1), upsample_factor=2)(x), "blur_pad11_up2", tolerance)
    case.close(Upsample()(x), "upsample", tolerance)
    case.close(upfirdn2d(x, smoothing_kernel(), down=2, pad=(1, 1)), "downsample", tolerance)
    case.close(_loaded(FusedLeakyReLU(3), case, "fused_leaky_relu")(x), "fused_leaky_relu", tolerance)
    case.close(_loaded(ConvLayer(3, 4, 3, downsample=True), case, "convlayer_down3")(x), "convlayer_down3", tolerance)
    case.close(_loaded(ConvLayer(3, 4, 1), case, "convlayer_conv1")(x), "convlayer_conv1", tolerance)
    skip = ConvLayer(3, 4, 1, downsample=True, activate=False, bias=False)
    case.close(_loaded(skip, case, "convlayer_skip1")(x), "convlayer_skip1", tolerance)
    case.close(_loaded(ResBlock(3, 4), case, "resblock")(case.inputs["resblock_x"]), "resblock", tolerance)
    case.close(
        _loaded(EqualLinear(6, 5), case, "equal_linear")(case.inputs["equal_linear_x"]), "equal_linear", tolerance
    )


@pytest.mark.parametrize(
    "name, kernel, options",
    [
        ("modconv_plain3", 3, {}),
        ("modconv_plain1_nodemod", 1, {"demodulate": False}),
        ("modconv_up3", 3, {"upsample": True}),
        ("modconv_down3", 3, {"downsample": True}),
    ],
)
@torch.no_grad()
def test_modulated_convolutions_agree(name, kernel, options):
    case = Case("image_ops")
    module = _loaded(ModulatedConv2d(3, 5, kernel, 6, **options), case, name)
    case.close(module(case.inputs[f"{name}.x"], case.inputs[f"{name}.style"]), name, 1e-5)


@pytest.mark.parametrize("name", ["audio_all_layers", "audio_last_layer"])
@torch.no_grad()
def test_audio_encoder_agrees(name):
    case = Case(name)
    config, weights = case.config, rename_weight_norm(case.weights)
    encoder = AudioEncoder.from_config(
        Wav2Vec2Config(**config["wav2vec2_config"]), only_last_features=config["only_last_features"]
    )
    missing = encoder.load_state_dict(
        {k: v for k, v in weights.items() if k.startswith("wav2vec2.")}, strict=False
    ).missing_keys
    assert missing == ["wav2vec2.masked_spec_embed"]
    projection = AudioProjection(encoder.feature_width, config["dim_w"])
    projection.load_state_dict({k: v for k, v in weights.items() if k.startswith("audio_projection.")})
    fps, frames = config["fps"], config["T"]
    length, before, wave = int(config["wav2vec_sec"] * config["fps"]), config["num_prev_frames"], case.inputs["wav"]
    assert frames_of(wave.shape[1], fps) == frames
    case.close(encoder.raw_features(wave, frames), "raw_hidden", 1e-5)
    case.close(projection(encoder.raw_features(pad_to_frames(wave, frames, fps), frames)), "inference", 1e-5)
    clip = case.inputs["clip_short"]
    case.close(projection(encoder.raw_features(pad_to_frames(clip, length, fps), length)), "train_clip_padded", 1e-5)
    both = pad_to_frames(torch.cat([case.inputs["prev_wav"], clip], 1), length + before, fps)
    case.close(projection(encoder.raw_features(both, length + before)), "train_clip_with_prev", 1e-5)
    for count in (1, 3, 7, 12):
        case.close(resample_features(case.inputs["interp_in"], count), f"interp_{count}", 1e-5)


@torch.no_grad()
def test_emotion_recogniser_agrees():
    case = Case("emotion_ser")
    recogniser = Audio2Emotion.from_config(Wav2Vec2Config(**case.config["wav2vec2_config"]))
    classifier = recogniser.wav2vec2_for_emotion
    assert classifier.load_state_dict(rename_weight_norm(case.weights), strict=False).unexpected_keys == []
    case.close(classifier(case.inputs["wav"]), "logits", 1e-5)
    case.close(recogniser(case.inputs["wav"]), "probs", 1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_full_size_transformer_agrees():
    case = Case("fullsize_fmt")
    with torch.device("meta"):
        model = FlowMatchingTransformer()
    model.to_empty(device="cpu")
    fresh = FlowMatchingTransformer(depth=1)
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            parameter.copy_(fresh.pos_embed)
        else:
            amplitude = math.sqrt(3 / parameter.shape[-1]) if parameter.ndim == 2 else 0.1
            parameter.copy_(formula_values(f"fmt.{name}", tuple(parameter.shape), amplitude))
    model.alignment_mask.copy_(fresh.alignment_mask)
    shapes = {"x": (1, 50, 512), "wa": (1, 50, 512), "wr": (1, 512), "prev_x": (1, 10, 512), "prev_wa": (1, 10, 512)}
    made = {name: formula_values(f"in.{name}", shape, math.sqrt(3)) for name, shape in shapes.items()}
    arguments = [made["x"], made["wa"], made["wr"], case.inputs["we"], made["prev_x"], made["prev_wa"]]
    case.close(model.eval()(case.inputs["t"], *arguments), "velocity", 2e-4)
    case.close(guided_velocity(model, case.inputs["t"], *arguments, SamplingOptions()), "cfv_a2_e1", 2e-4)


def _test_picture(k: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(512, dtype=torch.float64), torch.arange(512, dtype=torch.float64), indexing="ij")
    waves = [0.6 * torch.sin(2 * math.pi * ((1 + c + k) * x / 512 + (2 - c + k) * y / 512 + 0.1 * c)) for c in range(3)]
    noise = formula_values(f"in.image{k}", (1, 3, 512, 512), 0.2).double()
    return (torch.stack(waves)[None] + noise).float()


def _autoencoder_amplitude(name: str) -> tuple[float, float]:
    if name.endswith("modulation.bias"):
        return 0.1, 1.0
    if name.endswith(("bias", "noise.weight")):
        return 0.1, 0.0
    return (3 * math.sqrt(3) if name == "enc.net_app.convs.8.weight" else math.sqrt(3)), 0.0


@pytest.mark.slow
@torch.no_grad()
def test_full_size_autoencoder_agrees():
    case = Case("fullsize_autoencoder_512")
    model = MotionAutoencoder()
    for name, parameter in model.named_parameters():
        amplitude, centre = _autoencoder_amplitude(name)
        parameter.copy_(formula_values(f"motion_autoencoder.{name}", tuple(parameter.shape), amplitude, centre))
    source, driving = _test_picture(0), _test_picture(1)
    w, motion, features = model.encode_source(source)
    case.close(w, "w", 1e-4)
    case.close(model.enc.fc(w), "lambda_source", 1e-4)
    case.close(model.enc.enc_motion(driving), "lambda_drive", 1e-4)
    case.close(motion, "motion_source", 1e-4)
    case.close(model.dec.direction(None), "basis_Q", 1e-4)
    for index, feature in enumerate(features):
        case.close(torch.stack([feature.mean(), feature.std()]), f"feat{index}_mean_std", 1e-3)
    for name, target in (("drive", model.encode_motion(driving)), ("self", motion)):
        image = model.decode(w, target, features)[:, :, ::4, ::4]
        difference = (image - case.outputs[f"image_{name}_stride4"]).abs()
        assert difference.mean() < 5e-5 and difference.max() < 2e-2


def test_equal_linear_with_activation_and_learning_rate_factor():
    case = Case("image_ops")
    module = EqualLinear(6, 5, lr_mul=0.5, activation=True)
    module = _loaded(module, case, "equal_linear_lrmul_act")
    x = case.inputs["equal_linear_x"]
    by_hand = {}
    for factor in (0.01, 0.1, 0.5):
        out = F.linear(x, module.weight * factor / math.sqrt(6)) + module.bias * factor
        by_hand[factor] = (
            (F.leaky_relu(out, 0.2) * math.sqrt(2) - case.outputs["equal_linear_lrmul_act"]).abs().max().item()
        )
    assert min(by_hand.values()) < 1e-5
    factor = min(by_hand, key=by_hand.get)
    module.scale, module.lr_mul = factor / math.sqrt(6), factor
    with torch.no_grad():
        case.close(module(x), "equal_linear_lrmul_act", 1e-5)
