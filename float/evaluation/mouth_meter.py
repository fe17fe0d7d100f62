"""A small network that reads the opening of the mouth off a frame, trained on true frames of rendered clips.

It scores generated frames: what counts is what can be seen. Truth: mouth_open_px of the clips' motion tables, in
pixels of the rendered picture; for filmed clips how loud the person is, which true frames show. Pictures: float32
(B, 3, S, S) in [-1, 1].
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from float.data.clips import Clip, read_table
from float.data.media import to_tensor
from float.evaluation.formulas import log_energy
from shared.errors import UserError, written_aside
from shared.rng import keyed_generator

HEIGHT, WIDTH = 22, 28  # of the mouth as the meter sees it
STEPS, BATCH, LEARNING_RATE = 500, 48, 2e-3
SHIFT = 0.04  # largest random displacement of the box, share of the picture's side
LOG_GAMMA, GAIN = 0.3, 0.3  # largest changes of a picture's gamma, and of a colour's gain
LOUD_RANGE = 6.0  # nats of energy, 26 dB
LEAST_SPREAD = 0.05  # added to the deviation of a crop's pixels
_METER = 341  # random stream


class MouthMeter(nn.Module):
    """Picture -> opening of the mouth, in units of the truth's deviation around its mean."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, box: list[float]):
        super().__init__()
        self.box = box
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (HEIGHT // 4) * (WIDTH // 4), 48),
            nn.ReLU(),
            nn.Linear(48, 1),
        )
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def crop(self, image: Tensor, shift_B2: Tensor | None = None) -> Tensor:
        """The mouth (B, 3, 22, 28); shift (B, 2): displacement of the box, x and y, as shares of the side."""
        left, top, right, bottom = self.box
        ys = torch.linspace(top, bottom, HEIGHT) * 2 - 1
        xs = torch.linspace(left, right, WIDTH) * 2 - 1
        grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).expand(len(image), -1, -1, -1)
        if shift_B2 is not None:
            grid = grid + 2 * shift_B2[:, None, None]
        return F.grid_sample(image, grid, align_corners=False, padding_mode="border")

    def forward(self, crop: Tensor) -> Tensor:
        # a mouth is read by its shape: skin, beard and light of people that no clip shows differ in level and contrast
        level, spread = crop.mean((2, 3), keepdim=True), crop.std((2, 3), keepdim=True)
        return self.layers((crop - level) / (spread + LEAST_SPREAD))[:, 0]

    @torch.no_grad()
    def measure(self, frames: np.ndarray) -> np.ndarray:
        """Opening (T,) in pixels of the truth, of frames uint8 (T, S, S, 3)."""
        self.eval()
        parts = [self(self.crop(to_tensor(frames[start : start + 64]))) for start in range(0, len(frames), 64)]
        return (torch.cat(parts) * self.deviation + self.mean).numpy()


def read_truth(clip: Clip) -> np.ndarray | None:
    """mouth_open_px of every frame, None for a clip without a motion table."""
    if clip.motion is None or not clip.motion.exists():
        return None
    try:
        return np.array([float(row["mouth_open_px"]) for row in read_table(clip.motion, ("mouth_open_px",))])
    except (ValueError, TypeError) as error:
        raise UserError(f"{clip.motion}: mouth_open_px must hold a number in every row ({error})") from None


def loudness(wave: np.ndarray, *, fps: float, frames: int) -> np.ndarray:
    """What stands for the opening where nobody measured it, (frames,): log energy of three frames on average, 0 at
    LOUD_RANGE below the clip's loudest frame and less.
    """
    energy = log_energy(wave, fps=fps, frames=frames)
    level = np.clip((energy - energy.max()) / LOUD_RANGE + 1, 0, 1)
    return np.convolve(np.pad(level, 1, mode="edge"), np.ones(3) / 3, "valid")


def train_meter(frames: list[np.ndarray], truths: list[np.ndarray], box: list[float], *, seed: int = 0) -> MouthMeter:
    """Fit to true frames, lists over clips of (T, S, S, 3) and (T,), with random displacement, blur and brightness."""
    torch.manual_seed(seed)
    meter = MouthMeter(box)
    images = torch.cat([to_tensor(clip) for clip in frames])
    target = torch.cat(
        [torch.from_numpy(truth[: len(clip)]).float() for clip, truth in zip(frames, truths, strict=True)]
    )
    meter.mean.copy_(target.mean())
    meter.deviation.copy_(target.std())
    target = (target - meter.mean) / meter.deviation
    optimizer = torch.optim.AdamW(meter.parameters(), lr=LEARNING_RATE, weight_decay=1e-3, fused=True)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        generator = keyed_generator(seed, _METER, step)
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.smooth_l1_loss(meter(_augmented(meter, images[chosen], generator)), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return meter.eval()


def _augmented(meter: MouthMeter, image: Tensor, generator: torch.Generator) -> Tensor:
    """Crops moved, of another gamma, each colour of another gain, and half of them blurred as generated frames are."""

    def draws(*shape: int) -> Tensor:
        return torch.rand(len(image), *shape, generator=generator)

    crop = meter.crop(image, (draws(2) * 2 - 1) * SHIFT)
    gamma = torch.exp((draws(1, 1, 1) * 2 - 1) * LOG_GAMMA)
    crop = (crop / 2 + 0.5).clamp(1e-3, 1) ** gamma * (1 + GAIN * (draws(3, 1, 1) * 2 - 1)) * 2 - 1
    crop = crop + 0.2 * (draws(1, 1, 1) - 0.5)
    blurred = F.avg_pool2d(F.pad(crop, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.where(draws(1, 1, 1) < 0.5, blurred, crop)


def meter_for(
    frames: list[np.ndarray], truths: list[np.ndarray], box: list[float], cache: Path, key: str
) -> MouthMeter:
    """A meter trained on these clips; kept in `cache` and used again while `key` (what it is made of) is the same."""
    try:
        with safe_open(str(cache), "pt") as file:
            same = (file.metadata() or {}).get("key") == key
    except (OSError, SafetensorError):
        same = False  # none yet, or a damaged one
    if same:
        meter = MouthMeter(box)
        meter.load_state_dict(load_file(cache))
        return meter.eval()
    meter = train_meter(frames, truths, box)
    with written_aside(cache) as temporary:
        temporary.write_bytes(
            save({name: value.contiguous() for name, value in meter.state_dict().items()}, {"key": key})
        )
    return meter
