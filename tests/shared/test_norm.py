"""The hand-written RMS norm agrees with torch's, in value and gradient."""

import pytest
import torch
from torch import nn

from shared.engine.norm import RMSNorm


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_values_and_gradients_are_torch_s(shape):
    ours, theirs = RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)
    with torch.no_grad():
        weight = torch.randn(8)
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    grad = torch.randn(shape)
    for module, value in zip((ours, theirs), inputs, strict=True):
        module(value).backward(grad)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-5, rtol=1e-4)


def test_other_precisions_take_torch_s_kernel():
    norm, x = RMSNorm(8, eps=1e-6).bfloat16(), torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(norm(x), torch.nn.functional.rms_norm(x, (8,), norm.weight, 1e-6))


def test_a_frozen_weight_gets_no_gradient_and_the_input_the_same():
    trained, frozen = RMSNorm(8, eps=1e-6), RMSNorm(8, eps=1e-6)
    frozen.weight.requires_grad_(False)
    inputs = [torch.linspace(-1, 1, 24).reshape(3, 8).requires_grad_() for _ in range(2)]
    for module, value in zip((trained, frozen), inputs, strict=True):
        module(value).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad) and frozen.weight.grad is None
