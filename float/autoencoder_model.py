"""What phase 1 trains: the motion auto-encoder and, when adversarial terms are on, its discriminators."""

import torch
from torch import Tensor, nn

from float.config import DataConfig, ModelConfig
from float.modules.discriminators import Discriminators
from float.weights.open import make_autoencoder


class AutoencoderWithJudges(nn.Module):
    """One forward pass gives the picture and the discriminators' terms, so that any strategy can wrap the whole."""

    def __init__(self, model: ModelConfig, data: DataConfig, *, adversarial: bool):
        super().__init__()
        self.motion_autoencoder = make_autoencoder(model)
        if adversarial:
            self.discriminators = Discriminators(
                model.input_size, model.channels, mouth_box=data.mouth_box, eye_box=data.eye_box
            )

    def forward(
        self, source: Tensor, driving: Tensor, *, judge: bool, penalise: bool, both_ways: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """-> (source picture with the motion of the driving one (B, 3, S, S), the picture that it should be, terms of
        the discriminators; empty without them). both_ways: 2 B pictures, the second half with the roles exchanged.
        """
        if both_ways:
            frames, target = torch.cat([source, driving]), torch.cat([driving, source])
            identity, motion, features = self.motion_autoencoder.encode_source(frames)
            output = self.motion_autoencoder.decode(identity, motion.roll(len(source), 0), features)
        else:
            output, target = self.motion_autoencoder(source, driving), driving
        terms = self.discriminators(output, target, penalise=penalise) if judge else {}
        return output, target, terms
