"""Linear layers through oneDNN: the same numbers and gradients as torch's own, and where they are taken."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from shared.engine import products
from shared.engine.products import Linear, linear, use_fast_products


@pytest.fixture
def calls(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The matrices of every product that oneDNN was given; on any processor that has it."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    taken = []
    real = products._Product.forward

    def counted(a_MK, b_NK, bias_N):
        taken.append((products._dense(a_MK), products._dense(b_NK)))
        return real(a_MK, b_NK, bias_N)

    monkeypatch.setattr(products._Product, "forward", staticmethod(counted))
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    return taken


def inputs(*shape: int, rows: int = 128, bias: bool = True) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, requires_grad=True), torch.randn(rows, shape[-1], requires_grad=True)
    return [x, weight, torch.randn(rows, requires_grad=True) if bias else None]


def gradients(product, tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    wanted = [tensor for tensor in tensors if tensor is not None]
    out = product(*tensors)
    return [out, *torch.autograd.grad(out.sin().sum(), wanted)]


@pytest.mark.parametrize("shape, bias", [((96, 100), True), ((2, 3, 40, 64), True), ((90, 128), False)])
def test_equals_torch_forward_and_backward(calls, shape, bias):
    tensors = inputs(*shape, bias=bias)
    for ours, theirs in zip(gradients(linear, tensors), gradients(functional.linear, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    assert len(calls) == 3 * (torch.Size(shape).numel() * 128 >= products.SMALLEST)


def test_small_products_stay_torchs(calls):
    tensors = inputs(8, 16)
    for ours, theirs in zip(gradients(linear, tensors), gradients(functional.linear, tensors), strict=True):
        assert torch.equal(ours, theirs)
    assert not calls


def test_slices_of_wider_matrices_come_to_onednn_without_gaps(calls):
    """A part of the columns: oneDNN would take its reference kernel, which was 80 times slower."""
    torch.manual_seed(1)
    x, weight = torch.randn(200, 90)[:, 10:74], torch.randn(100, 200)[:, 7:71]
    torch.testing.assert_close(linear(x, weight), functional.linear(x, weight), rtol=1e-4, atol=1e-4)
    assert all(matrix.is_contiguous() or matrix.t().is_contiguous() for pair in calls for matrix in pair) and calls


def test_gradient_that_is_one_number_everywhere(calls):
    x, weight, bias = inputs(128, 128)
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(128, 128), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen, kept", [((), [0, 1]), ((1,), [1]), ((0,), [0]), ((0, 1), [])])
def test_what_no_gradient_needs_is_not_kept(calls, frozen, kept):
    """A frozen layer keeps its weight for the gradient of what comes before, and not what entered it."""
    tensors, seen = inputs(128, 128), []
    for number in frozen:
        tensors[number].requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        linear(*tensors)
    pointers = [tensor.data_ptr() for tensor in tensors[:2]]
    assert sorted(pointers.index(tensor.data_ptr()) for tensor in seen) == kept and calls


def test_compiled_once_whatever_the_size(calls):
    counter = CompileCounter()
    compiled = torch.compile(linear, backend=counter, fullgraph=True, dynamic=True)
    for rows in (2, 60, 3000):
        compiled(torch.randn(rows, 128), torch.randn(64, 128))
    assert counter.frame_count == 1 and not calls


def test_second_derivative(calls):
    def penalty(product):
        (slope,) = torch.autograd.grad(product(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().mean(), (x, weight))

    x, weight, bias = inputs(128, 128)
    for ours, theirs in zip(penalty(linear), penalty(functional.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


def test_what_is_planned_cast_compiled_or_switched_off_is_torchs(calls):
    x, weight, bias = inputs(128, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype is torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight, bias)
    linear(x.double(), weight.double(), bias.double())
    with FakeTensorMode():
        linear(torch.empty(128, 128), torch.empty(128, 128))
    linear(x.to("meta"), weight.to("meta"), bias.to("meta"))
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), functional.linear(x, weight, bias))
    assert not calls


def test_a_model_keeps_its_parameters_and_its_subclasses(calls):
    class Own(nn.Linear):
        pass

    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(96, 128), Own(128, 128))
    before, x = copy.deepcopy(model), torch.randn(256, 96)
    use_fast_products(model)
    assert [type(layer) for layer in model] == [Linear, Own]
    assert model.state_dict().keys() == before.state_dict().keys()
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def test_only_where_mkl_leaves_half_of_the_processor_unused(monkeypatch):
    products.onednn_is_faster.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not products.onednn_is_faster()
    products.onednn_is_faster.cache_clear()
