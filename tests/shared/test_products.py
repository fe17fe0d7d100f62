"""Linear layers through oneDNN: the same numbers and gradients as torch's own, and where they are taken."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import TrainingSection
from shared.engine import products, recompute
from shared.engine.dist import DistInfo
from shared.engine.products import Linear, linear, use_fast_products
from shared.engine.strategy import Strategy
from shared.optim import decay_groups


@pytest.fixture
def calls(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The matrices of every product that oneDNN was given; on any processor that has it."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    taken = []
    real = torch.ops.mkldnn._linear_pointwise

    def counted(a_MK, b_NK, *others):
        taken.append((a_MK, b_NK))
        return real(a_MK, b_NK, *others)

    monkeypatch.setattr(products, "_onednn", counted)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    return taken


class Executed(TorchDispatchMode):
    """Counts the products that oneDNN computes, without those whose outcome a checkpoint has kept."""

    products = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.products += function is torch.ops.mkldnn._linear_pointwise.default
        return function(*arguments, **(named or {}))


def inputs(*shape: int, rows: int = 128, bias: bool = True) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, requires_grad=True), torch.randn(rows, shape[-1], requires_grad=True)
    return [x, weight, torch.randn(rows, requires_grad=True) if bias else None]


def gradients(product, tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    wanted = [tensor for tensor in tensors if tensor is not None]
    out = product(*tensors)
    return [out, *torch.autograd.grad(out.sin().sum(), wanted)]


@pytest.mark.parametrize(
    "shape, bias", [((96, 100), True), ((2, 3, 140, 64), True), ((300, 128), False), ((300, 120), True)]
)
def test_equals_torch_forward_and_backward(calls, shape, bias):
    tensors = inputs(*shape, bias=bias)
    for ours, theirs in zip(gradients(linear, tensors), gradients(functional.linear, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    assert len(calls) == 3 * (len(shape) > 2 or shape[0] == 300)


def test_small_products_stay_torchs(calls):
    tensors = inputs(8, 16)
    for ours, theirs in zip(gradients(linear, tensors), gradients(functional.linear, tensors), strict=True):
        assert torch.equal(ours, theirs)
    assert not calls


def test_slices_of_wider_matrices_come_to_onednn_without_gaps(calls):
    """A part of the columns: oneDNN would take its reference kernel, which was 80 times slower."""
    torch.manual_seed(1)
    x, weight = torch.randn(700, 90)[:, 10:74], torch.randn(100, 200)[:, 7:71]
    torch.testing.assert_close(linear(x, weight), functional.linear(x, weight), rtol=1e-4, atol=1e-4)
    assert calls and all(a.is_contiguous() and (b.is_contiguous() or b.t().is_contiguous()) for a, b in calls)


def test_gradient_that_is_one_number_everywhere(calls):
    x, weight, bias = inputs(256, 128)
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(256, 128), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen, kept", [((), [0, 1]), ((1,), [1]), ((0,), [0]), ((0, 1), [])])
def test_what_no_gradient_needs_is_not_kept(calls, frozen, kept):
    """A frozen layer keeps its weight for the gradient of what comes before, and not what entered it."""
    tensors, seen = inputs(256, 128), []
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

    x, weight, bias = inputs(256, 128)
    for ours, theirs in zip(penalty(linear), penalty(functional.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


def test_what_is_planned_cast_compiled_or_switched_off_is_torchs(calls):
    x, weight, bias = inputs(256, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype is torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight, bias)
    linear(x.double(), weight.double(), bias.double())
    with FakeTensorMode():
        linear(torch.empty(256, 128), torch.empty(128, 128))
    linear(x.to("meta"), weight.to("meta"), bias.to("meta"))
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), functional.linear(x, weight, bias))
    assert not calls


@pytest.mark.parametrize("made", [lambda n: torch.arange(2.0 * n)[::2], lambda n: torch.ones(1).expand(n), torch.ones])
def test_a_bias_with_gaps(calls, made):
    """oneDNN reads it as if it had none: wrong numbers, without a word."""
    x, weight, _ = inputs(512, 128)
    torch.testing.assert_close(
        linear(x, weight, made(128)), functional.linear(x, weight, made(128)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "x, weight, bias",
    [((1024, 100), (128, 128), (128,)), ((512, 128), (128, 128), (64,)), ((4096, 2048), (4096,), None)],
)
def test_shapes_that_do_not_fit_are_told_in_torchs_words(calls, x, weight, bias):
    tensors = [None if shape is None else torch.zeros(shape) for shape in (x, weight, bias)]
    with pytest.raises(RuntimeError) as theirs:
        functional.linear(*tensors)
    with pytest.raises(RuntimeError) as ours:
        linear(*tensors)
    assert str(ours.value) == str(theirs.value)


def test_one_vector_and_few_rows_stay_torchs(calls):
    weight = torch.randn(4096, 2048)
    for shape in ((2048,), (1, 2048), (3, 1, 2048)):
        x = torch.randn(shape)
        assert torch.equal(linear(x, weight), functional.linear(x, weight))
    assert not calls


def test_transforms_of_functions_and_tracing_are_torchs(calls):
    x, weight, bias = (tensor.detach() for tensor in inputs(512, 128))
    assert torch.func.vmap(lambda row: linear(row, weight, bias))(x[None]).shape == (1, 512, 128)
    slope = torch.func.jvp(lambda w: linear(x, w, bias), (weight,), (weight,))[1]
    torch.testing.assert_close(slope, x @ weight.t(), rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x), weight)).tangent
    torch.testing.assert_close(slope, x @ weight.t(), rtol=1e-4, atol=1e-4)
    torch.jit.save(torch.jit.trace(Linear(128, 128), (x,), check_trace=False), io.BytesIO())
    assert not calls
    with torch.inference_mode():
        assert linear(x, weight, bias).is_inference() and len(calls) == 1


def test_what_comes_out_may_be_changed_in_place(calls):
    x, weight, bias = inputs(4, 128, 128)
    out = linear(x, weight, bias)
    out += 1
    out[:, :2] *= 2
    out.relu_().sum().backward()
    other = functional.linear(x.detach(), weight.detach(), bias.detach()) + 1
    other[:, :2] *= 2
    torch.testing.assert_close(out, other.relu(), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="modified by an inplace"), torch.enable_grad():
        out = linear(x, weight, bias)
        with torch.no_grad():
            weight += 1
        out.sum().backward()


@pytest.mark.parametrize("keeps, products_taken", [(False, 4), (True, 3)])
def test_recomputed_blocks(calls, monkeypatch, keeps, products_taken):
    """With kept products the backward pass multiplies two more times, without once more for the forward."""
    monkeypatch.setattr(recompute, "_keeps_products", keeps)
    tensors = inputs(2, 256, 128)
    wanted = gradients(functional.linear, tensors)
    with Executed() as executed:
        found = gradients(lambda *given: recompute.checkpoint(linear, *given), tensors)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert executed.products == products_taken


def test_two_threads_at_once(calls):
    tensors = inputs(512, 128)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: gradients(linear, tensors), range(4)))
    assert (
        all(torch.equal(a, b) for found in both[1:] for a, b in zip(found, both[0], strict=True)) and len(calls) == 12
    )


def test_a_model_keeps_its_parameters_and_its_subclasses(calls):
    class Own(nn.Linear):
        pass

    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(96, 128), Own(128, 128))
    before, x = copy.deepcopy(model), torch.randn(500, 96)
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


def test_a_training_gives_its_layers_the_fast_forward():
    """Also those of an objective around the model, such as a decoder of masked patches: a quarter of that step."""
    objective = nn.ModuleDict({"model": nn.Linear(3, 4), "decoder": nn.Sequential(nn.Linear(4, 3))})
    strategy = Strategy("none", DistInfo(), "fp32", TrainingSection())
    strategy.prepare(objective, decay_groups(objective, 0.0))
    assert all(type(layer) is Linear for layer in (objective["model"], objective["decoder"][0]))
