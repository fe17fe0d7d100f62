"""Adversarial terms of phase 1: StyleGAN2 discriminators for the picture at two scales, for eyes and for lips.

Non-saturating loss (Goodfellow et al. 2014), R1 penalty (Mescheder et al. 2018), feature style matching on Gram
matrices (GFPGAN, Wang et al. 2021). Pictures: (B, 3, S, S) in [-1, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from float.config import DataConfig, ModelConfig
from float.modules.image_ops import ConvLayer, EqualLinear, ResBlock
from float.modules.losses import box_slices
from float.weights.open import make_autoencoder

LAST_SIDE = 4


class _Body(nn.Module):
    """Picture -> (logit (B,), features of every resolution)."""

    def __init__(self, side: int, channels: dict[int, int]):
        super().__init__()
        self.stem = ConvLayer(3, channels[side], 1)
        sides = [2**exponent for exponent in range(int(math.log2(side)), 2, -1)]
        self.blocks = nn.ModuleList(ResBlock(channels[s], channels[s // 2]) for s in sides)
        width = channels[LAST_SIDE]
        self.last = ConvLayer(width + 1, width, 3)
        self.head = nn.Sequential(EqualLinear(width * LAST_SIDE**2, width, activation=True), EqualLinear(width, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = self.stem(image), []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        # deviation over the batch as one more channel, which shows a lack of variety
        deviation = x.float().var(0, unbiased=False).add(1e-8).sqrt().mean().to(x.dtype)
        x = self.last(torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], 1))
        return self.head(x.flatten(1))[:, 0], features


class Discriminator(nn.Module):
    """A discriminator that can be asked with its weights held fixed, so that generator and discriminator share one
    backward pass.
    """

    def __init__(self, side: int, channels: dict[int, int], box: list[float] | None = None):
        super().__init__()
        self.side, self.box = side, box
        self.body = _Body(side, channels)

    def view(self, image: Tensor) -> Tensor:
        """The part of the picture that it judges."""
        if self.box is not None:
            rows, columns = box_slices(self.box, image.shape[-1])
            image = image[..., rows, columns]
        if image.shape[-2:] == (self.side, self.side):
            return image
        return F.interpolate(image, size=(self.side, self.side), mode="bilinear", antialias=True)

    def forward(self, view: Tensor, *, fixed: bool) -> tuple[Tensor, list[Tensor]]:
        """(logit, features) of an already cut view; fixed=True sends no gradient to the weights."""
        if not fixed:
            return self.body(view)
        weights = {name: value.detach() for name, value in self.body.named_parameters()}
        return functional_call(self.body, weights, (view,))


def gram(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, C), divided by C H W."""
    flat = features.float().flatten(2)
    return flat @ flat.transpose(1, 2) / (flat.shape[1] * flat.shape[2])


class Discriminators(nn.Module):
    """Full picture at two scales, eyes, lips; all their losses in one call."""

    def __init__(self, size: int, channels: dict[int, int], *, mouth_box: list[float], eye_box: list[float]):
        super().__init__()
        part = max(16, size // 4)
        self.full = Discriminator(size, channels)
        self.coarse = Discriminator(max(8, size // 2), channels)
        self.eyes = Discriminator(part, channels, eye_box)
        self.lips = Discriminator(part, channels, mouth_box)

    def forward(self, output: Tensor, target: Tensor, *, penalise: bool) -> dict[str, Tensor]:
        """adversarial and style (for the generator), discriminator and r1 (for the discriminators); sums over the four.

        penalise: compute the R1 penalty on the true pictures in this step.
        """
        zero = output.new_zeros(())
        terms = {"adversarial": zero, "style": zero, "discriminator": zero, "r1": zero}
        for judge in (self.full, self.coarse, self.eyes, self.lips):
            made, true = judge.view(output), judge.view(target).detach()
            logit, features = judge(made, fixed=True)
            terms["adversarial"] = terms["adversarial"] + F.softplus(-logit.float()).mean()
            fake_logit, _ = judge(made.detach(), fixed=False)
            real_view = true.requires_grad_(penalise)
            real_logit, true_features = judge(real_view, fixed=False)
            loss = F.softplus(fake_logit.float()).mean() + F.softplus(-real_logit.float()).mean()
            terms["discriminator"] = terms["discriminator"] + loss
            if judge.box is not None:
                matched = zip(features, true_features, strict=True)
                style = sum((gram(ours) - gram(theirs.detach())).abs().mean() for ours, theirs in matched)
                terms["style"] = terms["style"] + style / len(features)
            if penalise:
                (gradient,) = torch.autograd.grad(real_logit.sum(), real_view, create_graph=True)
                terms["r1"] = terms["r1"] + gradient.square().flatten(1).sum(1).mean()
        return terms


class AutoencoderWithJudges(nn.Module):
    """What phase 1 trains: the motion auto-encoder and, when adversarial terms are on, its discriminators. One forward
    pass gives the picture and all terms, so that any strategy can wrap the whole.
    """

    def __init__(self, model: ModelConfig, data: DataConfig, *, adversarial: bool):
        super().__init__()
        self.motion_autoencoder = make_autoencoder(model)
        if adversarial:
            self.discriminators = Discriminators(
                model.input_size, model.channels, mouth_box=data.mouth_box, eye_box=data.eye_box
            )

    def forward(
        self,
        source: Tensor,
        driving: Tensor,
        wanted: Tensor | None = None,
        wanted_back: Tensor | None = None,
        *,
        judge: bool,
        penalise: bool,
        both_ways: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """-> (source picture with the motion of the driving one (B, 3, S, S), the picture that it should be, terms of
        the discriminators; empty without them). wanted: that picture, None: the driving one; wanted_back: the same
        with the roles exchanged. both_ways: 2 B pictures, the second half with the roles exchanged.
        """
        wanted = driving if wanted is None else wanted
        wanted_back = source if wanted_back is None else wanted_back
        if both_ways:
            target = torch.cat([wanted, wanted_back])
            identity, motion, features = self.motion_autoencoder.encode_source(torch.cat([source, driving]))
            output = self.motion_autoencoder.decode(identity, motion.roll(len(source), 0), features)
        else:
            output, target = self.motion_autoencoder(source, driving), wanted
        terms = self.discriminators(output, target, penalise=penalise) if judge else {}
        return output, target, terms
