"""The Inception network that the Frechet Inception distance is defined by (Szegedy et al. 2016; Heusel et al. 2017).

TensorFlow's network of 2015-12-05 as pytorch-fid and torch-fidelity publish its weights, so FID is comparable with
published figures. It is torchvision's Inception v3 with four habits of its own: average pools leave the padding out of
the count, the last block pools by maximum, pictures are resized by TensorFlow 1's bilinear rule, and scaled by
(x - 128) / 128. Shapes: B pictures, C channels, H W pixels.
"""

import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.engine.checkpoint import read_weights_file
from shared.errors import CheckpointError, UserError

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth (or pt_inception-2015-12-05-6726825d.pth)"
SIDE = 299


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, given: int, made: int, kernel: int | tuple[int, int], *, stride: int = 1, padding: int | tuple = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(given, made, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(made, eps=0.001)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, made, H', W')."""
        return F.relu(self.bn(self.conv(x_BCHW)))


class BlockA(nn.Module):
    """35 x 35: 1x1, 5x5, two 3x3, pool."""

    def __init__(self, given: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(given, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(given, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(given, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(64, 96, 3, padding=1), Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(given, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, given, 35, 35) -> (B, 224 + pooled, 35, 35)."""
        small = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), small, double, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, given: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(given, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(given, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(64, 96, 3, padding=1), Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 288, 35, 35) -> (B, 768, 17, 17)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17 x 17: 7x7 as rows and columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2, self.branch7x7_3 = (
            Conv(width, width, (1, 7), padding=(0, 3)),
            Conv(width, 192, (7, 1), padding=(3, 0)),
        )
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = (
            Conv(width, width, (7, 1), padding=(3, 0)),
            Conv(width, width, (1, 7), padding=(0, 3)),
        )
        self.branch7x7dbl_4, self.branch7x7dbl_5 = (
            Conv(width, width, (7, 1), padding=(3, 0)),
            Conv(width, 192, (1, 7), padding=(0, 3)),
        )
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, 17, 17) -> the same shape."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, 17, 17) -> (B, 1280, 8, 8)."""
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8 x 8: 3x3 as a row and a column side by side."""

    def __init__(self, given: int, *, pool_by_maximum: bool) -> None:
        super().__init__()
        self.pool_by_maximum = pool_by_maximum
        self.branch1x1 = Conv(given, 320, 1)
        self.branch3x3_1 = Conv(given, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = (
            Conv(384, 384, (1, 3), padding=(0, 1)),
            Conv(384, 384, (3, 1), padding=(1, 0)),
        )
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(given, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = (
            Conv(384, 384, (1, 3), padding=(0, 1)),
            Conv(384, 384, (3, 1), padding=(1, 0)),
        )
        self.branch_pool = Conv(given, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, given, 8, 8) -> (B, 2048, 8, 8)."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pool_by_maximum else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class FIDInception(nn.Module):
    """Pictures uint8 (B, 3, H, W) of any size -> pooled features (B, 2048); names as in the public weights.

    classes: the classifier's rows (1008, 2048) without its bias, where the file has them.
    """

    classes: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, stride=2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (BlockC(n) for n in (128, 160, 160, 192))
        self.Mixed_7a = BlockD()
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, pool_by_maximum=False), BlockE(2048, pool_by_maximum=True)
        self.eval().requires_grad_(False)

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 2048)."""
        x = (resize_as_tensorflow1(pictures_BCHW.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


class ScriptedFeatures(nn.Module):
    """A TorchScript file as a feature network: uint8 (B, 3, H, W) -> (B, F).

    A file whose forward knows `return_features` (NVIDIA's inception-2015-12-05.pt) resizes by itself; any other gets
    uint8 (B, 3, 299, 299).
    """

    classes = None

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.module = module.eval()
        self.resizes = "return_features" in str(module.forward.schema)  # type: ignore[attr-defined]

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, F)."""
        if self.resizes:
            return self.module(pictures_BCHW, return_features=True).flatten(1).float()
        if pictures_BCHW.shape[2:] != (SIDE, SIDE):
            smooth = F.interpolate(pictures_BCHW.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
            pictures_BCHW = smooth.round().clamp(0, 255).to(torch.uint8)
        return self.module(pictures_BCHW).flatten(1).float()


def inception(weights: str | None) -> FIDInception | ScriptedFeatures:
    """The network of --inception-weights: the public FID weights, or a TorchScript file; nothing is downloaded.

    UserError: no file is given, it is not there, or it holds something else.
    """
    give = f"--inception-weights FILE, which is {INCEPTION_FILE} of torch-fidelity or pytorch-fid, or TorchScript"
    if weights is None:
        raise UserError(f"FID needs the Inception weights: give {give}")
    if not Path(weights).is_file():
        raise UserError(f"--inception-weights {weights}: no such file; give {give}")
    try:
        if _is_torchscript(weights):
            return ScriptedFeatures(torch.jit.load(weights, map_location="cpu"))
        state = read_weights_file(Path(weights))
        network = FIDInception()
        unused = ("fc.", "AuxLogits.")  # the classifiers, which FID does not use
        network.load_state_dict({name: value for name, value in state.items() if not name.startswith(unused)})
        network.classes = state.get("fc.weight")
    except (RuntimeError, KeyError, ValueError, AttributeError, EOFError, CheckpointError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--inception-weights {weights}: not the FID Inception weights ({reason}); give {give}"
        ) from None
    return network


def resize_as_tensorflow1(x_BCHW: Tensor, side: int) -> Tensor:
    """Bilinear without half-pixel centres: output pixel i looks at input i H / side; beyond the edge pixels repeat."""
    for axis in (2, 3):
        size = x_BCHW.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=x_BCHW.device) * (size / side)
        low = place.floor().long().clamp(max=size - 1)
        weight = (place - low).reshape([-1 if a == axis else 1 for a in range(4)])
        lower = x_BCHW.index_select(axis, low)
        upper = x_BCHW.index_select(axis, (low + 1).clamp(max=size - 1))
        x_BCHW = lower + (upper - lower) * weight
    return x_BCHW


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _is_torchscript(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
