"""--float8: what it needs, and which layers it takes."""

import contextlib
import sys
import types

import pytest
import torch
from torch import nn

from shared.engine import recompute
from shared.errors import UserError


@pytest.mark.parametrize(
    "card, package, precision, strategy, compiled, message",
    [
        ((8, 0), True, "bf16", None, True, "a GPU that multiplies in float8"),
        ((9, 0), False, "bf16", None, True, "the package torchao"),
        ((8, 9), True, "fp32", None, True, "--precision bf16, not fp32"),
        ((9, 0), True, "bf16", "zero2", True, "the strategies none, ddp or fsdp, not zero2"),
        ((9, 0), True, "bf16", "fsdp", False, "--compile"),
        ((9, 0), True, "bf16", "fsdp", True, None),
    ],
)
def test_float8_says_what_it_lacks(monkeypatch, card, package, precision, strategy, compiled, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    monkeypatch.setattr(recompute, "find_spec", lambda name: object() if package else None)
    with pytest.raises(UserError, match=f"--float8 needs {message}") if message else contextlib.nullcontext():
        recompute.check_float8(precision, torch.device("cuda"), strategy, compiled)


def test_float8_takes_the_linear_layers_that_its_kernels_can_multiply(monkeypatch):
    """With a stand-in for torchao, which is no package of the environment; it walks a module as that does."""

    def convert(block, *, module_filter_fn, config):
        taken.extend(name for name, layer in block.named_modules() if module_filter_fn(layer, name))

    taken: list[str] = []
    stand_in = types.SimpleNamespace(Float8LinearConfig=dict, convert_to_float8_training=convert)
    monkeypatch.setitem(sys.modules, "torchao", types.SimpleNamespace(float8=stand_in))
    monkeypatch.setitem(sys.modules, "torchao.float8", stand_in)
    block = nn.ModuleDict({"up": nn.Linear(32, 64), "head": nn.Linear(64, 7), "norm": nn.LayerNorm(32)})
    recompute.use_float8([block])
    assert taken == ["up"]
    with pytest.raises(UserError, match="no block of this model has a linear layer"):
        recompute.use_float8([nn.ModuleDict({"head": nn.Linear(64, 7)})])
