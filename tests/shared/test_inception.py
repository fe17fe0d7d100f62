"""The FID network: names and sizes of the public weights, the resizing rule by hand, and the files that are refused."""

import pytest
import torch
from torch import nn

from shared.errors import UserError
from shared.media.inception import FIDInception, inception, resize_as_tensorflow1


def random_weights() -> dict[str, torch.Tensor]:
    """A state of the public file's form, scaled so that features are neither zero nor huge."""
    generator = torch.Generator().manual_seed(0)
    state = FIDInception().state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator)
            fan = value[0].numel() if value.ndim == 4 else 1
            spread = name.endswith(("running_var", "bn.weight"))
            state[name] = 1 + 0.1 * drawn.abs() if spread else drawn * ((2 / fan) ** 0.5 if fan > 1 else 0.1)
    return state


def test_the_public_file_loads_strictly_and_gives_2048_features(tmp_path):
    state = random_weights()
    # torchvision's Inception v3: 27,161,264 parameters, less 3,326,696 of the auxiliary head and 2,049,000 of the last
    assert sum(parameter.numel() for parameter in FIDInception().parameters()) == 27_161_264 - 3_326_696 - 2_049_000
    path = tmp_path / "weights.pth"
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    network = inception(str(path))
    assert network.classes is not None and network.classes.shape == (1008, 2048)  # for the Inception score
    pictures = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    both = network(pictures)
    assert both.shape == (2, 2048) and both.isfinite().all() and both.std() > 0.01
    assert torch.allclose(network(pictures[1:]), both[1:], atol=1e-3 * both.abs().max())
    assert not torch.allclose(both[0], both[1], rtol=0.01)


def test_resizing_looks_at_i_times_height_over_side():
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert resize_as_tensorflow1(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert resize_as_tensorflow1(ramp, 2)[0, 0].tolist() == [[0, 2], [0, 2]]
    assert torch.equal(resize_as_tensorflow1(ramp.mT, 8), resize_as_tensorflow1(ramp, 8).mT)


def test_torchscript_files(tmp_path):
    class Mean(nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3)) + x.shape[2]

    class Public(nn.Module):
        def forward(self, x, return_features: bool = False):
            return x.float().mean((2, 3)) + x.shape[2] if return_features else x.float().mean((1, 2, 3))

    pictures = torch.full((2, 3, 20, 30), 7, dtype=torch.uint8)
    for kind, side in ((Mean, 299), (Public, 20)):
        torch.jit.script(kind()).save(str(tmp_path / "file.pt"))
        assert torch.allclose(inception(str(tmp_path / "file.pt"))(pictures), torch.full((2, 3), 7.0 + side))


def test_what_is_no_inception_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(UserError, match="FID needs the Inception weights: give --inception-weights FILE"):
        inception(None)
    with pytest.raises(UserError, match="no such file"):
        inception(str(tmp_path / "none.pth"))
    for name in ("other", "list", "text", "empty"):
        with pytest.raises(UserError, match=f"{name}.pth: not the FID Inception weights"):
            inception(str(tmp_path / f"{name}.pth"))
