"""The transformer, the auto-encoders, and the released layout."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Wav2Vec2Model

from float.config import PRESETS, Config, DataConfig, ModelConfig
from float.data.media import to_uint8
from float.data.pose import MIRRORED, _Level, as_condition, clip_tracker, face_box
from float.model import FlowMatchingTransformer, MotionGenerator
from float.modules.audio import (
    SAMPLE_RATE,
    AudioEncoder,
    LogMelEncoder,
    convolved,
    normalise_waveform,
    pad_to_samples,
    rename_weight_norm,
)
from float.modules.autoencoder import MotionAutoencoder, edit_motion
from float.modules.compact import CompactAutoencoder
from float.modules.discriminators import AutoencoderWithJudges
from float.modules.emotion import Audio2Emotion
from float.sampling.animate import Animator, audio_windows
from float.sampling.motion import SamplingOptions, sample_motion
from float.sampling.still import StillHead, fading
from float.weights.open import load_autoencoder, load_generator, make_autoencoder, make_generator, unsaved_names
from float.weights.released import export_released_layout, load_released_checkpoint, released_state
from shared.config import load_config, load_saved
from shared.errors import UserError
from tests.float.golden import FOLDER, small_transformer

KEYS = json.loads((FOLDER / "keys.json").read_text())
TINY_CHANNELS = {4: 8, 8: 8, 16: 6, 32: 4}


def tiny_settings(**changes):
    model = {
        "input_size": 32,
        "dim_w": 12,
        "dim_m": 4,
        "dim_h": 16,
        "dim_a": 10,
        "fmt_depth": 1,
        "num_heads": 2,
        "channels": TINY_CHANNELS,
        "audio_features": "logmel",
    }
    return ModelConfig(**model | changes), DataConfig(sequence_length=16, prev_frames=4)


def test_official_names_and_shapes_are_the_released_ones():
    config = load_saved(Config, PRESETS / "official.yaml")
    with torch.device("meta"):
        modules = {"motion_autoencoder.": make_autoencoder(config.model)}
        generator = make_generator(config.model, config.data)
    modules |= {"fmt.": generator.fmt, "audio_encoder.": generator.audio_encoder}
    own = {
        prefix + name: list(value.shape)
        for prefix, module in modules.items()
        for name, value in module.state_dict().items()
    }
    foreign = ("audio_encoder.wav2vec2.", "emotion_encoder.")
    recorded = {name: shape for name, (shape, _, _) in KEYS.items() if not name.startswith(foreign)}
    assert own == recorded
    parameters = [name for name, (_, kind, source) in KEYS.items() if kind == "param" and source == "float.pth"]
    assert len(parameters) == 274
    total = sum(value.numel() for module in modules.values() for value in module.parameters())
    assert total == 206_657_800
    assert sum(p.numel() for p in generator.fmt.parameters() if p.requires_grad) == 156_636_672


@torch.no_grad()
def test_foreign_encoders_have_the_recorded_names():
    from transformers import Wav2Vec2Config

    from float.modules.audio import AudioEncoder
    from float.modules.emotion import Audio2Emotion

    large = Wav2Vec2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
    )
    with torch.device("meta"):
        modules = {
            "audio_encoder.": AudioEncoder.from_config(Wav2Vec2Config(), only_last_features=False),
            "emotion_encoder.": Audio2Emotion.from_config(large),
        }
    own = {
        prefix + name: list(value.shape)
        for prefix, module in modules.items()
        for name, value in module.named_parameters()
    }
    recorded = {
        name: shape for name, (shape, kind, source) in KEYS.items() if kind == "param" and source != "float.pth"
    }
    assert own == recorded


@pytest.mark.parametrize(
    "preset, expected", [("default", 232_195_584), ("large", 307_754_496), ("official", 156_636_672)]
)
def test_presets_have_the_stated_size(preset, expected):
    config = load_saved(Config, PRESETS / f"{preset}.yaml")
    with torch.device("meta"):
        generator = make_generator(config.model, config.data)
    assert sum(p.numel() for p in generator.fmt.parameters() if p.requires_grad) == expected


def test_a_fresh_transformer_gives_zero_and_learns_at_its_end_first():
    model = FlowMatchingTransformer(dim_w=8, dim_a=6, dim_h=16, depth=2, num_heads=2, num_frames=6, num_prev_frames=2)
    out = model(torch.rand(3), torch.randn(3, 6, 8), torch.randn(3, 6, 6), torch.randn(3, 8), torch.rand(3, 1, 7))
    assert out.abs().max() == 0
    (out - 1).square().mean().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"decoder.linear.weight", "decoder.linear.bias"}


@torch.no_grad()
def test_frames_see_only_their_neighbours():
    model = small_transformer(depth=1, num_frames=10, num_prev_frames=3, attention_window=2)
    arguments = [torch.rand(1), torch.randn(1, 13, 8), torch.randn(1, 13, 6), torch.randn(1, 8), torch.rand(1, 1, 7)]
    before = model(*arguments)
    for frame in (0, 4, 12):
        changed = [value.clone() for value in arguments]
        changed[1][0, frame] += 1
        touched = (model(*changed) - before).abs().amax(-1)[0] > 1e-6
        assert touched.nonzero().flatten().tolist() == [i for i in range(13) if abs(i - frame) <= 2]


@pytest.mark.parametrize("depth, window, before", [(2, 1, 4), (4, 2, 5), (1, 0, 3), (2, 9, 4)])
def test_the_window_alone_is_the_end_of_all_frames(depth, window, before):
    sizes = {"dim_w": 6, "dim_a": 5, "dim_h": 16, "num_heads": 2, "num_frames": 8, "num_prev_frames": before}
    model = FlowMatchingTransformer(**sizes, depth=depth, attention_window=window)
    inputs = [torch.rand(2)] + [
        torch.randn(2, *shape) for shape in ((8, 6), (8, 5), (6,), (1, 7), (before, 6), (before, 5))
    ]
    found = []
    for window_only in (False, True):
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
        out = model(*inputs, window_only=window_only)[:, -8:]
        found.append(
            [out, *torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])]
        )
    for all_frames, alone in zip(*found, strict=True):
        torch.testing.assert_close(alone, all_frames, rtol=1e-4, atol=1e-5 * all_frames.abs().max().item())


@torch.no_grad()
def test_dropped_conditions_are_per_sample_and_leave_the_inputs_alone():
    generator = MotionGenerator(small_transformer(), 5)
    arguments = [
        torch.rand(3),
        torch.randn(3, 6, 8),
        torch.randn(3, 6, 5),
        torch.randn(3, 8),
        torch.rand(3, 1, 7),
        torch.randn(3, 2, 8),
        torch.randn(3, 2, 5),
    ]
    kept = [value.clone() for value in arguments]
    full = generator(*arguments)
    drop = torch.zeros(3, 5, dtype=torch.bool)
    for column in range(5):
        drop[:] = False
        drop[1, column] = True
        rows = (generator(*arguments, drop_B5=drop) - full).abs().amax((1, 2)) > 1e-6
        assert rows.tolist() == [False, True, False]
    assert all(torch.equal(a, b) for a, b in zip(arguments, kept, strict=True))


def test_the_pose_is_one_more_condition_in_every_way_of_calling():
    """A row of zeros says nothing; frames see their own pose; several passes at once are single ones."""
    torch.manual_seed(0)
    small = {"dim_w": 5, "dim_a": 6, "dim_h": 16, "depth": 2, "num_heads": 2, "num_frames": 7, "num_prev_frames": 3}
    plain, posed = FlowMatchingTransformer(**small), FlowMatchingTransformer(**small, pose_width=7)
    for parameter in posed.parameters():
        parameter.data.normal_(std=0.3)
    plain.load_state_dict({name: value for name, value in posed.state_dict().items() if "p_embedder" not in name})
    t, x, wa, wr, we = torch.rand(2), torch.randn(2, 7, 5), torch.randn(2, 7, 6), torch.randn(2, 5), torch.rand(2, 1, 7)
    inputs = t, x, wa, wr, we, torch.randn(2, 3, 5), torch.randn(2, 3, 6)
    pose = torch.randn(2, 10, 7)
    for window_only in (False, True):
        without = plain(*inputs, window_only=window_only)
        assert torch.equal(posed(*inputs, window_only=window_only), without)
        assert torch.allclose(posed(*inputs, pose_BN7=0 * pose, window_only=window_only), without, atol=1e-6)
        given = posed(*inputs, pose_BN7=pose, window_only=window_only)
        assert (given - without).abs().amax(2).min() > 1e-3
        passes = [(False, True, False), (True, True, True)]
        both = posed.velocities(*inputs, passes=passes, pose_BN7=pose, window_only=window_only)
        silent = posed(t, x, 0 * wa, wr, 0 * we, *inputs[5:], pose_BN7=pose, window_only=window_only)
        assert torch.allclose(both[0], silent, atol=1e-5) and torch.allclose(both[1], given, atol=1e-5)
    with pytest.raises(ValueError, match="without a pose condition"):
        plain(*inputs, pose_BN7=pose)


@pytest.mark.parametrize("relative", [False, True])
def test_a_given_pose_is_laid_into_the_motion_and_an_unknown_one_is_not(relative):
    """What no pose explains stays, so does a constant of the first window; what is read off less it is the pose."""
    torch.manual_seed(0)
    generator = MotionGenerator(
        FlowMatchingTransformer(dim_w=9, dim_h=8, num_heads=1, pose_width=7), 5, relative=relative
    )
    effect, people = torch.linalg.qr(torch.randn(9, 9))[0][:6], torch.randn(5, 1, 9)
    poses = torch.randn(5, 40, 6) * torch.tensor([0.1, 0.1, 0.05, 0.02, 0.02, 0.02])
    motions = poses @ effect + 0.01 * torch.randn(5, 40, 9)
    generator.set_pose_statistics(zip(motions + people, poses, strict=True))
    window, condition = 5 + torch.randn(2, 16, 9), as_condition(poses[:2, :16])
    constant = generator.pose_constant(window, condition)
    assert (generator.with_pose(window, condition, constant) - window).mean(1).abs().max() < 1e-4
    condition[:, 3] = 0
    moved = generator.with_pose(window, condition, constant)
    assert torch.equal(moved[:, 3], window[:, 3])
    assert torch.allclose((moved @ generator.motion_pose_read - constant)[:, 4:], poses[:2, 4:16], atol=1e-4)
    assert (moved - window)[:, 4:].abs().mean() > 0.1


def test_the_tracker_reads_how_a_head_turned_moved_and_grew():
    """A face of our own, drawn as an ellipsoid under a known pose; a mirrored face has the mirrored pose."""
    random, side = np.random.default_rng(3), 64
    rough = torch.from_numpy(random.random((1, 3, 12, 12))).float()
    rest = F.interpolate(rough, (side, side), mode="bicubic", align_corners=True).clamp(0, 1)[0] * 2 - 1
    data = DataConfig()
    tracker, fine = clip_tracker(to_uint8(rest), data), _Level(rest[None], face_box(data), data.mouth_box, side)
    poses = torch.tensor(random.uniform(-0.12, 0.12, (6, 6)))
    # a frame shows at places(p) what the other has: its inverse is found by a few rounds
    places = fine.places(0 * poses)
    for _ in range(20):
        there = F.grid_sample(fine.places(poses).movedim(-1, 1), places, padding_mode="border", align_corners=False)
        places = places + fine.places(0 * poses) - there.movedim(1, -1)
    frames = F.grid_sample(rest.expand(6, -1, -1, -1), places.float(), padding_mode="border", align_corners=False)
    found = tracker(frames).double()
    assert (found - poses).abs().mean() < 0.015 < 0.05 < poses.abs().mean()
    mirrored = clip_tracker(to_uint8(rest.flip(-1)), data)(frames.flip(-1))
    assert torch.allclose(mirrored.double(), found * MIRRORED, atol=5e-3)


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = small_transformer()
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        model(
            torch.rand(2), torch.randn(2, 6, 8), torch.randn(2, 6, 6), torch.randn(2, 8), torch.rand(2, 1, 7)
        ).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", [MotionAutoencoder, CompactAutoencoder])
def test_directions_are_orthonormal_and_edits_touch_one(kind):
    torch.manual_seed(0)
    model = kind(32, 12, 4, TINY_CHANNELS)
    with torch.no_grad():
        basis = model.dec.direction(None)
        assert torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-5)
        motion = model.encode_motion(torch.rand(3, 3, 32, 32))
        edited = edit_motion(motion, basis, {2: 1.5}, {0: 0.25})
    before, after = motion @ basis, edited @ basis
    assert torch.allclose(after[:, 2], torch.tensor(1.5), atol=1e-5)
    assert torch.allclose(after[:, 0], before[:, 0] + 0.25, atol=1e-5)
    assert torch.allclose(after[:, [1, 3]], before[:, [1, 3]], atol=1e-5)


@pytest.mark.parametrize("kind", ["lia", "compact"])
def test_what_a_run_does_not_save_of_the_autoencoder_is_the_same_in_every_process(kind):
    """Or phase 2 could not resume: it asks whether the auto-encoder is the one whose motion it has learned."""
    model = ModelConfig(
        autoencoder=kind, input_size=32, channels={side: 8 for side in (4, 8, 16, 32)}, dim_w=16, dim_m=4
    )
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        autoencoder = make_autoencoder(model)
        unsaved = unsaved_names(autoencoder)
        ends.append({name: value for name, value in autoencoder.state_dict().items() if name in unsaved})
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_compact_autoencoder_starts_as_a_copy_of_the_source():
    torch.manual_seed(0)
    model, source = CompactAutoencoder(32, 12, 4, TINY_CHANNELS), torch.rand(2, 3, 32, 32)
    assert torch.allclose(model(source, torch.rand(2, 3, 32, 32)), source, atol=1e-4)


@pytest.mark.parametrize("kind", ["lia", "compact"])
@torch.no_grad()
def test_a_pair_used_both_ways_gives_the_pictures_of_two_passes(kind):
    torch.manual_seed(0)
    model, data = tiny_settings(autoencoder=kind)
    network = AutoencoderWithJudges(model, data, adversarial=False)
    if kind == "compact":  # its heads are zero at the start
        torch.nn.init.normal_(network.motion_autoencoder.dec.mouth_residual.weight)
    first, second = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    there, _, _ = network(first, second, judge=False, penalise=False)
    back, _, _ = network(second, first, judge=False, penalise=False)
    both, target, _ = network(first, second, judge=False, penalise=False, both_ways=True)
    assert torch.equal(target, torch.cat([second, first]))
    assert torch.allclose(both, torch.cat([there, back]), atol=1e-4)


@torch.no_grad()
def test_the_compact_mouth_branch_draws_in_its_box_only():
    torch.manual_seed(0)
    model, source = CompactAutoencoder(32, 12, 4, TINY_CHANNELS, [0.25, 0.5, 0.75, 0.75]), torch.rand(1, 3, 32, 32)
    plain = model(source, torch.rand(1, 3, 32, 32))
    torch.nn.init.normal_(model.dec.mouth_residual.weight)
    changed = (model(source, torch.rand(1, 3, 32, 32)) - plain).abs().amax((0, 1)) > 1e-3
    assert changed[16:24, 8:24].any() and changed.sum() == changed[16:24, 8:24].sum()


@torch.no_grad()
def test_whitening_goes_there_and_back():
    generator = MotionGenerator(small_transformer(), 5, motion_width=12)
    basis = torch.linalg.qr(torch.randn(12, 8)).Q
    motion = (torch.randn(500, 8) * torch.linspace(0.5, 3, 8)) @ basis.T + torch.randn(12)
    generator.set_motion_statistics(motion)
    whitened = generator.whiten(motion)
    assert torch.allclose(torch.cov(whitened.T), torch.eye(8), atol=1e-3)
    assert torch.allclose(generator.unwhiten(whitened), motion, atol=1e-4)


@torch.no_grad()
def test_relative_motion_is_that_of_the_reference_taken_off_and_added_back():
    """Two people who move alike have the same motion in the flow's space, each with the own face as reference."""
    generator = MotionGenerator(small_transformer(), 5, motion_width=12, relative=True)
    moves, people = torch.randn(2, 6, 12), torch.randn(2, 12) * 5
    motion = moves[:1] + people[:, None]
    clips = torch.cat([clip for clip in motion])
    generator.set_motion_statistics(clips, spread_TD=(motion - motion.mean(1, keepdim=True)).flatten(0, 1))
    reference = motion[:, 2]
    relative = generator.whiten(motion, reference)
    assert torch.allclose(relative[0], relative[1], atol=1e-4) and relative[:, 2].abs().max() < 1e-5
    assert torch.allclose(generator.unwhiten(relative, reference), motion, atol=1e-2)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_released_file_may_be_safetensors_and_carry_a_wrappers_prefix(tmp_path, prefix):
    from safetensors.torch import save_file

    model, data = tiny_settings()
    autoencoder, generator = make_autoencoder(model), make_generator(model, data)
    state = {prefix + name: value for name, value in released_state(autoencoder, generator).items()}
    save_file(state, tmp_path / "FLOAT.safetensors")
    other = make_generator(model, data)
    load_generator(other, tmp_path / "FLOAT.safetensors")
    assert torch.equal(other.fmt.c_embedder.weight, generator.fmt.c_embedder.weight)
    loaded = load_autoencoder(model, str(tmp_path / "FLOAT.safetensors"))
    assert torch.equal(loaded.enc.fc[0].weight, autoencoder.enc.fc[0].weight)


def test_the_released_layout_goes_out_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model, data = tiny_settings()
    autoencoder, generator = make_autoencoder(model), make_generator(model, data)
    path = tmp_path / "float.pth"
    count = export_released_layout(path, autoencoder, generator)
    others = make_autoencoder(model), make_generator(model, data)
    report = load_released_checkpoint(path, *others)
    assert report.loaded == count and not report.unexpected
    restored, written = released_state(*others), released_state(autoencoder, generator)
    assert all(torch.equal(restored[name], value) for name, value in written.items())
    loaded = load_autoencoder(model, str(path))
    assert torch.equal(loaded.enc.fc[0].weight, autoencoder.enc.fc[0].weight)


def test_a_released_file_that_does_not_fit_is_refused_by_name(tmp_path):
    model, data = tiny_settings()
    path = tmp_path / "float.pth"
    export_released_layout(path, make_autoencoder(model), make_generator(model, data))
    state = torch.load(path, weights_only=True)
    state["optimizer.step"] = torch.zeros(1)
    torch.save(state, path)
    report = load_released_checkpoint(path, make_autoencoder(model), make_generator(model, data))
    assert report.unexpected == ["optimizer.step"]
    del state["fmt.c_embedder.bias"]
    torch.save(state, path)
    with pytest.raises(UserError, match="1 missing: fmt.c_embedder.bias"):
        load_released_checkpoint(path, make_autoencoder(model), make_generator(model, data))
    wider, _ = tiny_settings(dim_h=32)
    with pytest.raises(UserError, match="mismatched"):
        load_released_checkpoint(path, make_autoencoder(model), make_generator(wider, data))


def test_other_window_lengths_keep_their_own_position_table(tmp_path):
    model, data = tiny_settings()
    export_released_layout(tmp_path / "float.pth", make_autoencoder(model), make_generator(model, data))
    longer = make_generator(model, DataConfig(sequence_length=25, prev_frames=5, wav2vec_sec=1.0))
    table = longer.fmt.pos_embed.clone()
    load_released_checkpoint(tmp_path / "float.pth", make_autoencoder(model), longer)
    assert torch.equal(longer.fmt.pos_embed, table)


@torch.no_grad()
def test_a_clip_is_animated_as_its_windows_are_sampled_by_hand():
    """Raw sound in, with no sound and no previous sound as zeros after the projection."""
    model, data = tiny_settings(dim_w=8, dim_m=3)[0], DataConfig(sequence_length=6, prev_frames=2, wav2vec_sec=0.24)
    generator = MotionGenerator(small_transformer(), 5)
    torch.nn.init.normal_(generator.audio_encoder.audio_projection[1].bias)  # so that silence is not zero
    animator = Animator(generator, make_autoencoder(model), Config(model=model, data=data), torch.device("cpu"))
    raw, motion, emotion = torch.randn(1, 12, 5), torch.randn(1, 8), torch.rand(7)
    options = SamplingOptions(nfe=3, a_cfg_scale=2.0, e_cfg_scale=1.5)
    windows = animator.motion_windows(iter(raw.split(6, 1)), motion, emotion, options)
    sound, sizes = generator.audio_encoder(raw), {"num_frames": 6, "num_prev_frames": 2}
    expected = sample_motion(generator.fmt, sound, motion, emotion[None, None], options=options, **sizes)
    assert torch.allclose(torch.cat(list(windows), 1), expected, atol=1e-5)


def test_a_portrait_beyond_the_known_ones_keeps_its_level_and_the_generator_sees_a_known_one():
    model, data = tiny_settings(dim_w=8, dim_m=5)[0], DataConfig(sequence_length=6, prev_frames=2, wav2vec_sec=0.24)
    model = model.model_copy(update={"whiten_motion": True, "reference_limit": 1.0})
    generator = MotionGenerator(small_transformer(dim_w=5), 5, 8)
    generator.set_motion_statistics(torch.randn(50, 8))
    animator = Animator(generator, make_autoencoder(model), Config(model=model, data=data), torch.device("cpu"))
    raw, emotion, options = torch.randn(6, 5)[None], torch.zeros(7), SamplingOptions(nfe=3)
    known, far = torch.tensor([[1.0, -1, 0.5, 1, 0]]), torch.tensor([[3.0, -1.5, 0.5, 1, 0]])
    made = [
        next(animator.motion_windows(iter([raw]), generator.unwhiten(own), emotion, options)) for own in (known, far)
    ]
    moved = generator.whiten(made[1]) - generator.whiten(made[0])
    assert torch.allclose(moved, (far - known).expand(1, 6, 5), atol=1e-4)
    with pytest.raises(UserError, match="reference_limit 1.0 counts deviations of whitened motion; set whiten_motion"):
        load_config(Config, presets=PRESETS, argv=["--reference-limit", "1"], default="official")


def small_wav2vec2(norm: str = "group", **changes):
    """A wav2vec2 of two convolutions and one layer, with random weights."""
    from transformers import Wav2Vec2Config

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 4}
    layers = {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer", "num_conv_pos_embedding_groups": 2}
    torch.manual_seed(0)
    return Wav2Vec2Config(**{**small, **convolutions, **layers, **changes})


@torch.no_grad()
def test_streamed_sound_is_that_of_the_whole_clip_where_the_context_covers_it():
    encoder, wave = AudioEncoder.from_config(small_wav2vec2(), only_last_features=True), torch.randn(16000)
    whole, streamed = (
        list(audio_windows(encoder, wave, fps=25.0, length=10, stream=stream)) for stream in (False, True)
    )
    assert [len(window[0]) for window in streamed] == [10, 10, 5] == [len(window[0]) for window in whole]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(whole, streamed, strict=True))


@pytest.mark.parametrize("norm", ["group", "layer"])
@torch.no_grad()
def test_convolutions_in_chunks_give_the_features_of_the_whole_sound(norm, monkeypatch):
    """Also where a norm over time sees the whole sound."""
    model, wave = Wav2Vec2Model(small_wav2vec2(norm)).eval(), torch.randn(2, 5037)
    whole = model.feature_extractor(wave).transpose(1, 2)
    monkeypatch.setattr("float.modules.audio.CHUNK_SAMPLES", 700)
    assert torch.allclose(convolved(model, wave), whole, atol=1e-5)
    monkeypatch.undo()
    taken: list[int] = []  # a second at a time, so that ten seconds take the memory of ten minutes
    model.feature_extractor.conv_layers[0].conv.register_forward_hook(
        lambda _, given, __: taken.append(given[0].numel())
    )
    convolved(model, torch.randn(1, 5 * SAMPLE_RATE))
    assert max(taken) < 1.1 * SAMPLE_RATE


@torch.no_grad()
def test_windows_of_a_long_clip_are_whole_though_its_pieces_end_elsewhere():
    encoder, wave = AudioEncoder.from_config(small_wav2vec2(), only_last_features=True), torch.randn(16000 * 2 + 77)
    pieces = list(encoder.pieces(wave, 25.0, length=15, context=0.2))
    assert [len(piece) for piece in pieces] == [15, 15, 15, 6]
    encoder.pieces = lambda wave, fps: iter(pieces)
    windows = list(audio_windows(encoder, wave, fps=25.0, length=10, stream=False))
    assert [len(window[0]) for window in windows] == [10, 10, 10, 10, 10, 1]
    assert torch.equal(torch.cat(windows, 1)[0], torch.cat(pieces))


@torch.no_grad()
def test_the_recogniser_hears_long_sound_in_pieces_and_the_shortest_at_all(monkeypatch):
    recogniser = Audio2Emotion.from_config(small_wav2vec2("layer"))
    for samples in (1, 12, 399, 5000):
        found = recogniser(torch.randn(1, samples))
        assert found.shape == (1, 7) and torch.isfinite(found).all() and abs(found.sum() - 1) < 1e-5
    wave = torch.randn(1, 48000)
    whole = recogniser(wave)
    loud = 3 * wave[0] + 1  # is normalised while it is heard, without a copy of the whole
    assert torch.allclose(recogniser.hear(loud), recogniser(normalise_waveform(loud)[None])[0], atol=1e-6)
    monkeypatch.setattr("float.modules.emotion.HEARD_SECONDS", 1)
    assert 0 < (recogniser(wave) - whole).abs().max() < 0.05


def test_sound_features_line_up_with_the_frames():
    encoder = LogMelEncoder()
    for frame in (3, 20):
        tone = torch.zeros(16000)
        tone[640 * frame : 640 * (frame + 1)] = torch.sin(torch.arange(640) / 2)
        level = encoder.encode_clip(tone, 25.0).mean(1)
        level = level - level.min()
        assert level.argmax() == frame and abs(level[frame - 1] - level[frame + 1]) < 0.1 * level[frame]
    wave = torch.zeros(16000 * 2)
    wave[16000:17600] = torch.randn(1600)  # frames 25.0 to 27.5
    features = encoder.encode_clip(wave, 25.0).mean(1)
    assert len(features) == 50 and features.argmax().item() in (25, 26)
    assert torch.isfinite(encoder.encode_clip(torch.zeros(700), 25.0)).all()
    # silence and noise are pauses and not speech: neither blown up to unit variance, nor of average level
    noise, nothing = (encoder.encode_clip(wave, 25.0) for wave in (torch.randn(32000), torch.zeros(32000)))
    assert noise.std() < 0.5 and noise.mean() < -0.5 and torch.allclose(nothing, torch.tensor(-1.0))
    speech = torch.randn(32000) * torch.linspace(-9, 0, 20).exp().repeat_interleave(1600)
    features = encoder.encode_clip(speech, 25.0)
    assert abs(features.mean()) < 1e-5 and abs(features.std() - 1) < 1e-5
    normal = normalise_waveform(torch.randn(1000) * 3 + 1)
    assert abs(normal.mean()) < 1e-5 and abs(normal.std(unbiased=False) - 1) < 1e-4
    assert normalise_waveform(torch.zeros(10)).abs().max() == 0
    assert pad_to_samples(torch.tensor([[1.0, 2.0]]), 4).tolist() == [[1, 2, 2, 2]]
    assert list(rename_weight_norm({"a.weight_g": torch.zeros(1)})) == ["a.parametrizations.weight.original0"]


def test_only_the_lips_move_though_the_generated_head_turns_and_shifts():
    """Outside the mouth the picture itself, to the bit; the mouth where the portrait has it; brightness may differ."""
    random, data, side = np.random.default_rng(0), DataConfig(), 64
    rough = torch.from_numpy(random.random((1, 3, 9, 9))).float()
    rest = F.interpolate(rough, (side, side), mode="bicubic", align_corners=True).clamp(0, 1)
    spoken = rest.clone()
    spoken[..., 40:44, 28:36] = 0
    turn = torch.tensor([[[0.98, -0.06, 0.06], [0.06, 0.98, -0.05]]])  # 2 pixels, 3.5 degrees, 2 % smaller
    places = F.affine_grid(turn, [1, 3, side, side], align_corners=False)
    shifted = F.grid_sample(spoken * 2 - 1, places, padding_mode="border", align_corners=False)
    picture, opened = to_uint8(rest[0] * 2 - 1), to_uint8(spoken[0] * 2 - 1)
    frame = to_uint8(shifted[0] * 0.9)
    for moving, box in (("lips", data.mouth_box), ("face", [0.2, 0.3, 0.8, 0.82])):
        still = StillHead(picture, picture, moving, data, has_face=False)
        made = [still(frame) for _ in range(2)][1].astype(int)
        outside = fading(box, side)[0, 0].numpy() == 0
        assert outside.mean() > 0.5 and (made == picture)[outside].all()
        mouth = np.s_[40:44, 28:36]
        assert np.abs(made - opened)[mouth].mean() < 25 < 60 < np.abs(picture.astype(int) - opened)[mouth].mean()
        assert np.abs(made - opened).mean() < 4 < np.abs(frame.astype(int) - opened).mean()
    nothing_alike = still(np.zeros_like(picture))  # cannot be aligned: laid on as it is
    black = -torch.ones(1, 3, side, side)
    assert torch.equal(still.tracker.aligned(black), black) and nothing_alike.shape == picture.shape
