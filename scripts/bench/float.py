"""What FLOAT costs: the transformer's step and a guided window next to the same network with the paper's formulas
written out, training from the cache and from frames, a second of talking portrait, the loader, scaling.

    python scripts/bench/float.py [--parts peers precision use start loader scaling] [--rounds 5] [--output DIR]
    python scripts/bench/float.py --parts peers --peer CHECKOUT    (git worktree add CHECKOUT 8a67d66)
    bash scripts/bench.sh --system float
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.bench.bench import Bench, BenchOptions, Job, Row, planned_step, run_benchmark, training_step
from shared.config import load_config
from shared.errors import UserError, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(BenchOptions, description=__doc__)

import contextlib
import importlib.util
import io
import tempfile

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from float.config import AUTOENCODER_PRESETS, PRESETS, SAMPLE_DATA, AutoencoderConfig, Config, features_dir
from float.data.clips import Clip, find_clips
from float.data.features import feature_path, write_features
from float.data.frames import FramePairs, FrameStore, collate_pairs
from float.data.synthetic import synthetic_clip, write_synthetic_features
from float.dataset import FLOATDataset, create_dataloader
from float.model import FlowMatchingTransformer
from float.modules.audio import SAMPLE_RATE, LogMelEncoder
from float.plan import autoencoder_workload, workload
from float.sampling.animate import Animator, sampling_options
from float.sampling.motion import SamplingOptions, guided_velocity
from float.weights.open import make_autoencoder, make_generator
from shared.data import BatchPlan, MapStream
from shared.engine.dist import DistInfo
from shared.engine.products import Linear

PHASE_1_CLIPS = 4  # decoded for the loader of phase 1
OLD_STEP, OLD_WINDOW = 0.921, 1.007  # times of 8a67d66 over the official code's, side by side


def settings(*words: str) -> Config:
    """A preset with changes."""
    return load_config(Config, presets=PRESETS, argv=["--config", *words])


def transformer_step(
    depth: int = 4,
    width: int = 256,
    batch: int = 2,
    length: int = 50,
    before: int = 10,
    *,
    kind: type[FlowMatchingTransformer] = FlowMatchingTransformer,
) -> Job:
    """Forward, mean square of the velocity and backward of the transformer on made-up windows."""
    model = kind(dim_h=width, depth=depth, num_heads=8, num_frames=length, num_prev_frames=before)
    shapes = [(length, 512), (length, 512), (512,), (1, 7), (before, 512), (before, 512)]
    inputs, t_B = [torch.randn(batch, *shape) for shape in shapes], torch.rand(batch)
    step = training_step(model, lambda: model(t_B, *inputs, window_only=True)[:, -length:].square().mean())
    step.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return step


def use_plain_products(model: nn.Module) -> None:
    """Linear layers as torch multiplies them, as in every other peer; the reverse of use_fast_products()."""
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = nn.Linear


class PlainTransformer(FlowMatchingTransformer):
    """The same network and weights with the paper's formulas written out: the peer of every step and every window."""

    def __init__(self, **sizes: Any):
        super().__init__(**sizes)
        use_plain_products(self)

    def forward(self, t_B, x_BLd, wa_BLa, wr_Bd, we_B1E, prev_x_BPd, prev_wa_BPa, **_):
        """Velocity of all frames, (B, P + L, d)."""
        x, wa = torch.cat([prev_x_BPd, x_BLd], 1), torch.cat([prev_wa_BPa, wa_BLa], 1)
        tokens = x.shape[1]
        conditions = [wr_Bd[:, None].expand(-1, tokens, -1), wa, we_B1E.expand(-1, tokens, -1)]
        condition = self.c_embedder(torch.cat(conditions, -1)) + self.t_embedder(t_B)[:, None]
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(condition).chunk(6, -1)
            normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_a) + shift_a
            q, k, v = rearrange(block.attn.qkv(normed), "b n (t h k) -> t b h n k", t=3, h=block.attn.heads)
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=~self.alignment_mask)
            x = x + gate_a * block.attn.proj(rearrange(seen, "b h n k -> b n (h k)"))
            x = x + gate_m * block.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_m) + shift_m)
        shift, scale = self.decoder.adaLN_modulation(condition).chunk(2, -1)
        return self.decoder.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def guided_window(config: Config, *, plain: bool, steps: int = 3) -> Job:
    """A window of motion from raw sound under guidance, `steps` of the solver. plain: three passes in one batch, each
    of which projects the sound; else as sampling does it.
    """
    torch.manual_seed(0)
    generator, data = make_generator(config.model, config.data).eval(), config.data
    if plain:
        generator.fmt.__class__ = PlainTransformer
        use_plain_products(generator)
    width = generator.audio_encoder.audio_projection[0].in_features
    raw, before = torch.randn(1, data.sequence_length, width), torch.randn(1, data.prev_frames, width)
    wr, we, motion = torch.randn(1, generator.fmt.dim_w), torch.rand(1, 1, 7), generator.fmt.dim_w
    prev_x, start = torch.randn(1, data.prev_frames, motion), torch.randn(1, data.sequence_length, motion)
    options = SamplingOptions(a_cfg_scale=2.0)

    def velocity(t_B, x, wa, wr, we, prev_x, prev_wa):
        given = wa.flatten(1).any(1)[:, None, None]  # a pass without sound has zeros behind the projection
        project = generator.audio_encoder
        return generator.fmt(t_B, x, project(wa) * given, wr, we, prev_x, project(prev_wa))[:, data.prev_frames :]

    @torch.no_grad()
    def window() -> None:
        x, sounds = start, (raw, before) if plain else (generator.audio_encoder(raw), generator.audio_encoder(before))
        for step in range(steps):
            t_B = torch.full((1,), step / steps)
            model = velocity if plain else generator.fmt
            x = (
                x
                + guided_velocity(model, t_B, x, sounds[0], wr, we, prev_x, sounds[1], options)[:, -len(x[0]) :] / steps
            )

    return window


def old_model(path: Path) -> ModuleType:
    """float/model.py of another checkout, beside ours."""
    spec = importlib.util.spec_from_file_location("old_float_model", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--peer: {path} is no file; give a checkout of commit 8a67d66")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def old_window(old: ModuleType, config: Config, steps: int = 3) -> Job:
    """The guided window as 8a67d66 makes it: three passes in a batch, the sound projected in every step."""
    data, model = config.data, config.model
    plain = make_generator(model, data)
    width = plain.audio_encoder.audio_projection[0].in_features
    shape = {name: getattr(model, name) for name in ("dim_w", "dim_h", "num_heads", "mlp_ratio", "attention_window")}
    frames = {"num_frames": data.sequence_length, "num_prev_frames": data.prev_frames}
    generator = old.MotionGenerator(old.FlowMatchingTransformer(**shape, **frames, depth=model.fmt_depth), width).eval()
    generator.load_state_dict(plain.state_dict())
    sizes = ((data.sequence_length, model.dim_w), (data.sequence_length, width), (model.dim_w,), (1, 7))
    start, *given = (torch.randn(1, *size).repeat(3, *[1] * len(size)) for size in sizes)
    before = [torch.randn(1, data.prev_frames, size).repeat(3, 1, 1) for size in (model.dim_w, width)]
    chosen = {"null_audio_B": torch.tensor([True, False, False]), "has_previous_B": torch.ones(3, dtype=torch.bool)}

    @torch.no_grad()
    def window() -> None:
        x = start
        for step in range(steps):
            t_B = torch.full((3,), step / steps)
            without, full, sound = generator(t_B, x, *given, *before, **chosen, window_only=True).chunk(3)
            x = x + (without + 2 * (sound - without) + (full - sound)) / steps

    return window


def generator_loss(generator: nn.Module, config: Config, audio: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """Mean square of the velocity for raw sound (B, P + L, F) and motion latents (B, P + L, D)."""
    before, batch = config.data.prev_frames, len(audio)
    motion = generator.whiten(motion)
    output = generator(
        torch.rand(batch), motion[:, before:], audio[:, before:], motion[:, 0], torch.zeros(batch, 1, 7),
        motion[:, :before], audio[:, :before], window_only=True,
    )  # fmt: skip
    return output.square().mean()


def peers(bench: Bench) -> None:
    """The transformer against its plain form, and the small preset's step from the cache and from frames."""
    beside = bench.options.peer
    old = None if beside is None else old_model(Path(beside) / "float" / "model.py")
    step = transformer_step()
    sizes = f"depth 4, width 256, batch 2, 50 + 10 frames, {step.parameters:,} parameters"
    plain = transformer_step(kind=PlainTransformer)
    peer = "the paper's formulas written out, same weights"
    note = f"{sizes}; loss and gradients of the 50 frames"
    bench.pair("transformer step", step, plain, peer=peer, bar=0.85, note=note)
    official = settings("official")
    note = "L 50, P 10, raw sound of 9,216 features, 3 steps of the solver, guidance by sound and emotion"
    windows = [guided_window(official, plain=plain) for plain in (False, True)]
    bench.pair("guided window, official size", *windows, peer=peer, bar=0.70, note=note)
    if old is not None:
        name, theirs = "8a67d66, whose time is {} of the official code's", old.FlowMatchingTransformer
        bench.pair(
            "transformer step, official", step, transformer_step(kind=theirs), peer=name.format(OLD_STEP),
            bar=0.85, scale=1 / OLD_STEP, note=sizes,
        )  # fmt: skip
        bench.pair(
            "guided window, official", windows[0], old_window(old, official), peer=name.format(OLD_WINDOW),
            bar=0.70, scale=1 / OLD_WINDOW, note=note,
        )  # fmt: skip
    config = settings("small")
    generator, autoencoder = make_generator(config.model, config.data), make_autoencoder(config.model).eval()
    batch, frames = config.training.batch_size, config.data.sequence_length + config.data.prev_frames
    side, encoder = config.model.input_size, LogMelEncoder()
    pictures = torch.rand(batch * frames, 3, side, side) * 2 - 1
    sounds = torch.randn(batch, round(frames / config.data.video_fps * SAMPLE_RATE))

    def encoded() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            motion = autoencoder.encode_motion(pictures).unflatten(0, (batch, frames))
            audio = torch.stack([encoder.encode_clip(sound, config.data.video_fps)[:frames] for sound in sounds])
        return audio, motion

    features = encoded()
    note = f"small preset, batch {batch}, {frames} frames of {side} px a window"
    bench.pair(
        "rate of training from the cache",
        training_step(generator, lambda: generator_loss(generator, config, *features)),
        training_step(generator, lambda: generator_loss(generator, config, *encoded())),
        peer="encoding on the fly", bar=2.0, direction="at least", note=note,
    )  # fmt: skip


def precision(bench: Bench) -> None:
    """The transformer's step in bf16 and fp32."""
    bench.precision("transformer step", transformer_step())


def animation(config: Config, seconds: int) -> Job:
    """Motion from sound and frames from motion, by an untrained model of these settings."""
    generator, autoencoder = make_generator(config.model, config.data), make_autoencoder(config.model)
    animator = Animator(generator.eval(), autoencoder, config, torch.device("cpu"))
    side, frames = config.model.input_size, round(seconds * config.data.video_fps)
    portrait = animator.portrait(torch.zeros(side, side, 3, dtype=torch.uint8).numpy())
    sound = torch.randn(1, frames, generator.audio_encoder.audio_projection[0].in_features)
    options = sampling_options(config)

    def animate() -> None:
        windows = iter(sound.split(config.data.sequence_length, 1))
        motions = animator.motion_windows(windows, portrait.motion, torch.zeros(7), options)
        for _ in animator.frames(portrait, motions, total=frames):
            pass

    return animate


def use(bench: Bench) -> None:
    """A second of video, and reading windows."""
    config = settings("small")
    name = f"sampling, small preset, {config.model.input_size} px, guided, {config.model.nfe} time points"
    bench.time(name, animation(config, 2), per=2, unit="ms a second of video")
    with tempfile.TemporaryDirectory() as folder:
        dataset = synthetic_windows(settings("default", "--output-dir", folder))
        bench.time(
            "loading, default preset's windows from the cache", lambda: [dataset.sample(i % 32, 0) for i in range(128)],
            per=128, unit="ms a sample",
        )  # fmt: skip


def synthetic_windows(config: Config) -> FLOATDataset:
    """Windows of made-up clips in the sizes of the settings."""
    with contextlib.redirect_stdout(io.StringIO()):
        write_synthetic_features(config, DistInfo())
    return FLOATDataset(features_dir(config) / "train", config.data, train=True)


def start(bench: Bench) -> None:
    """From the command to the first step, which is phase 1's."""
    bench.startup("--config", "small")


def loader(bench: Bench) -> None:
    """The default presets' loaders beside a step of the planned length."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings("default", "--output-dir", folder)
        training = config.training
        stream = create_dataloader(
            synthetic_windows(config), batch_size=training.batch_size, num_workers=training.num_workers,
            prefetch_factor=training.prefetch_factor,
        )  # fmt: skip
        bench.starving(
            "default, cached windows",
            stream,
            planned_step(workload(config), config),
            note=f"batch {training.batch_size}",
        )
    pair_loader(bench)


def pair_loader(bench: Bench) -> None:
    """The same for phase 1: frames in memory, as where all clips fit, and read by seeking."""
    config = load_config(AutoencoderConfig, presets=AUTOENCODER_PRESETS, argv=["--config", "default"])
    store = FrameStore(find_clips(SAMPLE_DATA, "train")[:PHASE_1_CLIPS], config.model.input_size, config.data, {})
    decoded = [store.all_frames(clip) for clip in range(PHASE_1_CLIPS)]
    pairs = FramePairs(store, pairs_per_second=config.training.pairs_per_second, seed=0, augment=True)
    size = config.training.batch_size
    stream = MapStream(pairs, BatchPlan(len(pairs), size), DistInfo(), collate=collate_pairs)
    note = f"batch {size}, {config.model.input_size} px, {sum(map(len, decoded))} decoded frames in memory"
    planned = planned_step(autoencoder_workload(config), config)
    bench.starving("phase 1, default, frame pairs", stream, planned, note=note)
    store.in_memory = False
    bench.time(
        "loading, phase 1's pairs by seeking in the files", lambda: [pairs.sample(i, 0) for i in range(size)],
        per=size, unit="ms a pair",
    )  # fmt: skip


def scaling(bench: Bench) -> None:
    """Length of the sound, window, batch, parameters, clips on disk."""
    config = settings("small")
    bench.scaling(
        "seconds of sound", {seconds: animation(config, seconds) for seconds in (1, 2, 4, 8)},
        "ms of sampling: window after window, so the cost is that of the length and memory stays the same",
    )  # fmt: skip
    bench.scaling(
        "frames of a window", {length: transformer_step(length=length) for length in (25, 50, 100, 200)},
        "ms a training step: a frame attends to neighbours only, but the masked products are computed in full",
    )  # fmt: skip
    bench.scaling(
        "batch", {batch: transformer_step(batch=batch) for batch in (1, 2, 4, 8)},
        "ms a training step: near 1, the linear layers take all of it",
    )  # fmt: skip
    steps = [transformer_step(width=width, batch=1) for width in (128, 256, 512)]
    bench.scaling("parameters", {step.parameters: step for step in steps}, "ms a training step: as the parameters")
    with tempfile.TemporaryDirectory() as folder:
        jobs = {count: open_clips(Path(folder) / str(count), config, count) for count in (100, 400, 1600)}
        bench.scaling("clips on disk", jobs, "ms to open the set: the header of each clip's file is read once")


def open_clips(folder: Path, config: Config, count: int) -> Job:
    """A cache of `count` clips, and the job that opens it as a data set."""
    tensors = synthetic_clip(0, config.model.dim_w, 160, 0)
    for number in range(count):
        clip = Clip(f"clip{number}", Path(), Path(), "nobody")
        write_features(feature_path(folder, clip.clip_id), tensors, clip, "synthetic")
    return lambda: FLOATDataset(folder, config.data, train=True)


def gpu(bench: Bench) -> None:
    """The official size."""
    from scripts.bench.gpu import utilisation

    config = settings("official")
    config.training.batch_size = 256
    utilisation(bench, "FLOAT official, batch 256", workload(config), config, bar=0.45)


PARTS = {part.__name__: part for part in (peers, precision, use, start, loader, scaling, gpu)}


@command
def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print, and write the table where --output says."""
    return run_benchmark("float", PARTS, argv, __doc__)


if __name__ == "__main__":
    main()
