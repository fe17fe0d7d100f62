"""What phase 1 trains: the motion auto-encoder and, when adversarial terms are on, its discriminators."""

from torch import Tensor, nn

from float.build import make_autoencoder
from float.config import DataConfig, ModelConfig
from float.discriminators import Discriminators


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
        self, source: Tensor, driving: Tensor, *, judge: bool, penalise: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (source picture with the motion of the driving one (B, 3, S, S), terms of the discriminators; empty
        without them).
        """
        output = self.motion_autoencoder(source, driving)
        terms = self.discriminators(output, driving, penalise=penalise) if judge else {}
        return output, terms
