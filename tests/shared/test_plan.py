"""The plan of a small transformer, against numbers counted by hand. B batch, L tokens, D width, H heads, V words."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from shared.config import RunSection, TrainingSection
from shared.engine.recompute import checkpoint, keep_products
from shared.errors import UserError
from shared.plan.measure import GPUS, FrozenPart, Moment, describe, gpu_named, make_plan, measure

B, L, D, H, V, LAYERS = 2, 32, 64, 4, 100, 3
BLOCK = (D * 3 * D + 3 * D) + (D * D + D) + (D * 4 * D + 4 * D) + (4 * D * D + D) + 4 * D  # two norms
PARAMETERS = V * D + LAYERS * BLOCK + (D * V + V)


class Block(nn.Module):
    def __init__(self, recompute):
        super().__init__()
        self.norm_1, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm_2, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.recompute = recompute

    def run(self, x_BLD):
        q, k, v = self.qkv(self.norm_1(x_BLD)).reshape(B, L, 3, H, D // H).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D)
        x_BLD = x_BLD + self.out(mixed)
        return x_BLD + self.down(functional.gelu(self.up(self.norm_2(x_BLD))))

    def forward(self, x_BLD):
        return checkpoint(self.run, x_BLD) if self.recompute else self.run(x_BLD)


class Net(nn.Module):
    def __init__(self, recompute=False):
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block(recompute) for _ in range(LAYERS))
        self.head = nn.Linear(D, V)

    def forward(self, tokens_BL):
        x_BLD = self.table(tokens_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.head(x_BLD)


def step(model):
    tokens_BL = torch.randint(0, V, (B, L))
    return functional.cross_entropy(model(tokens_BL).flatten(0, 1).float(), tokens_BL.flatten())


def freeze_table(model):
    model.table.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def measured():
    return measure(Net, step, "fp32", (Block,))


def plan_of(
    measured,
    strategy="none",
    world=1,
    gpu=None,
    precision="fp32",
    frozen_parts=None,
    replicas=1,
    in_bf16=False,
    **training,
):
    settings = TrainingSection(**{"batch_size": B, **training})
    run = RunSection(precision=precision, fsdp_replicas=replicas, ddp_bf16=in_bf16)
    return make_plan(
        "toy", measured, run=run, training=settings, strategy=strategy, world=world, gpu=gpu, frozen_parts=frozen_parts
    )


# --- what one step shows ----------------------------------------------------------------------------------------------


def test_parameters_are_counted_exactly(measured):
    assert measured.trainable == PARAMETERS == sum(p.numel() for p in Net().parameters())
    assert measured.frozen == 0 and measured.trainable_bytes == 4 * PARAMETERS
    assert measured.block_bytes == 4 * (PARAMETERS - (LAYERS - 1) * BLOCK)  # one block, and what lies outside of all
    frozen = measure(lambda: freeze_table(Net()), step, "fp32")
    assert (frozen.trainable, frozen.frozen) == (PARAMETERS - V * D, V * D)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_equal_the_hand_count(precision):
    found = measure(Net, step, precision)
    products = 2 * B * L * (LAYERS * 12 * D * D + D * V)  # two FLOPs for each weight and token
    attention = LAYERS * 2 * 2 * B * H * L * L * (D // H)  # scores and weighted sum
    assert found.forward_flops == products + attention
    assert found.step_flops == 3 * (products + attention)  # towards the weights and towards the inputs


def test_frozen_layers_save_their_weights_gradient():
    def build():
        model = Net()
        model.blocks.requires_grad_(False)
        return model

    whole, found = measure(Net, step, "fp32"), measure(build, step, "fp32")
    assert found.forward_flops == whole.forward_flops
    # the table below still trains, so the gradients flow through the blocks
    assert whole.step_flops - found.step_flops == 2 * B * L * LAYERS * 12 * D * D


def test_recomputing_blocks_lowers_the_activations_and_costs_a_forward(measured):
    saved = measure(lambda: Net(recompute=True), step, "fp32", (Block,))
    assert saved.live_bytes(0) < 0.6 * measured.live_bytes(0) and saved.live_bytes(1) < measured.live_bytes(1)
    blocks_forward = measured.forward_flops - 2 * B * L * D * V
    last_products = LAYERS * 2 * B * L * 4 * D * D  # nothing in the block needs their results again
    assert saved.step_flops == measured.step_flops + blocks_forward - last_products
    assert measured.recomputed_flops == 0 and saved.recomputed_flops == blocks_forward - last_products


def test_products_can_be_kept_from_being_computed_again(measured):
    """The same gradients, every product once, and memory between that of all and that of nothing kept."""
    saved = measure(lambda: Net(recompute=True), step, "fp32", (Block,))
    losses, gradients = {}, {}
    for kept in (False, True):
        keep_products(kept)
        torch.manual_seed(0)
        model = Net(recompute=True)
        torch.manual_seed(1)
        losses[kept] = step(model)
        losses[kept].backward()
        gradients[kept] = [p.grad for p in model.parameters()]
        found = measure(lambda: Net(recompute=True), step, "fp32", (Block,))
    keep_products(False)
    assert all(torch.equal(one, two) for one, two in zip(*gradients.values(), strict=True))
    assert found.recomputed_flops == 0 and found.step_flops == measured.step_flops
    assert saved.live_bytes(0) < found.live_bytes(0) < measured.live_bytes(0)


def test_activations_hold_at_least_what_the_backward_needs(measured):
    kept = 4 * B * L * (LAYERS * (2 * D + 3 * D + D + 8 * D) + V)  # inputs of norms, products and the activation
    assert kept < measured.live_bytes(0) < 3 * kept
    assert measured.live_bytes(0) <= measured.live_bytes(0.25) <= measured.live_bytes(1) < 4 * PARAMETERS + 3 * kept


def test_nothing_is_allocated_for_a_model_of_any_size():
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2**16, 2**16, bias=False) for _ in range(16))  # 256 GiB

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    found = measure(Huge, lambda model: model(torch.randn(1, 2**16)).square().mean(), "bf16")
    assert found.trainable == 16 * 2**32 and found.forward_flops == 2 * 16 * 2**32


# --- what follows for a strategy --------------------------------------------------------------------------------------


def test_memory_parts_by_strategy(measured):
    size, half_copy, world = 4 * PARAMETERS, 2 * PARAMETERS, 4
    plans = {
        name: plan_of(measured, name, 1 if name == "none" else world, precision="bf16", ema_decay=0.9).memory
        for name in ("none", "ddp", "fsdp", "zero1", "zero2", "zero3")
    }
    parts = {name: tuple(plans[name][part] for part in PARTS) for name in plans}
    assert parts == {
        "none": (size, size, 2 * size, size),
        "ddp": (size, size, 2 * size, size),
        "fsdp": (size // 4, size // 4, 2 * size // 4, size // 4),
        "zero1": (size // 4 + half_copy, size, 2 * size // 4, size),
        "zero2": (size // 4 + half_copy, size // 4, 2 * size // 4, size),
        "zero3": (size // 4 + half_copy // 4, size // 4, 2 * size // 4, size // 4),
    }
    gathered = {name for name in plans if "gathered units" in plans[name]}
    assert gathered == {"fsdp", "zero3"} and plans["ddp"]["activations"] == measured.live_bytes(0)


PARTS = ("weights", "gradients", "Adam moments", "moving average")


def test_encoders_and_a_cast_base_take_host_memory(measured):
    """Every rank of the node builds in fp32 what is then cast, and keeps an encoder that stays off the card."""
    encoder = FrozenPart("encoder", 10, 0, host_bytes=7)
    found = dataclasses.replace(measured, frozen_bytes=2 * measured.trainable, frozen=measured.trainable)
    run, training = RunSection(gpus_per_node=2), TrainingSection(save_in_background=False)
    for in_fp32, size in ((False, 4 + 2), (True, 4 + 4)):
        plan = make_plan(
            "toy",
            found,
            run=run,
            training=training,
            strategy="ddp",
            world=4,
            frozen_parts=[encoder],
            built_in_fp32=in_fp32,
        )
        assert plan.host_bytes == 2 * (size * PARAMETERS + 7) and "frozen encoders" not in plan.memory
        assert plan.startup_bytes == 6 * PARAMETERS


def test_no_average_and_no_frozen_parts_take_no_memory(measured):
    assert "moving average" not in plan_of(measured).memory and "frozen encoders" not in plan_of(measured).memory
    part = FrozenPart("encoder", 10, 1234, 5e6)
    plan = plan_of(measured, frozen_parts=[part], gradient_accumulation_steps=3)
    assert plan.memory["frozen encoders"] == 1234
    assert plan.flops_per_step == 3 * (measured.step_flops + 5e6) and plan.samples_per_step == 3 * B
    assert plan.peak_memory == sum(plan.memory.values())


def test_traffic_of_a_ring(measured):
    assert plan_of(measured).traffic_bytes == 0
    assert plan_of(measured, "ddp", 2).traffic_bytes == 4 * PARAMETERS  # half of it, scattered and gathered
    assert plan_of(measured, "ddp", 2, in_bf16=True).traffic_bytes == 2 * PARAMETERS
    gathers = 2 * 3 * 4 * PARAMETERS  # forward and backward of three micro-steps
    kept = 3 * 4 * measured.root  # what is in no unit is gathered once for both
    sharded = plan_of(measured, "fsdp", 2, gradient_accumulation_steps=3)
    assert 0 < measured.root < PARAMETERS and sharded.traffic_bytes == (4 * PARAMETERS + gathers - kept) / 2
    assert plan_of(measured, "ddp", 8).traffic_bytes > plan_of(measured, "ddp", 2).traffic_bytes


def test_zero3_holds_its_flat_pieces_until_all_weights_were_used():
    """As counted on two ranks: multimodal, whose peak comes later, was planned at 1.06 of what was measured."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x_BD):
            return self.last(self.first(x_BD)).repeat(100, 1).exp().square().sum()

    found = measure(Late, lambda model: model(torch.randn(10, 8)), "fp32")
    first, later, *_ = found.live
    assert first.others < 4 * 3 * 10 * 8 < later.others and not later.gradients
    size = 4 * 2 * 8 * 8
    assert found.zero3_bytes(4) == size + max(moment.others - moment.gradients for moment in found.live[1:])
    early = dataclasses.replace(found, live=(later, *found.live[1:]))
    assert early.zero3_bytes(4) == 2 * size + later.others


def test_fsdp_holds_the_flat_copy_of_what_the_forward_gathered_last():
    """Counted on two CPU ranks: without units that is the whole model, twice (FLOAT's phase 1)."""
    peak = (Moment(0, 0, 0, 0, 1000),)
    found = dataclasses.replace(measure(lambda: nn.Linear(1, 1), one_product, "fp32"), live=peak, root=10)
    assert found.sharded_bytes(0.5, 4) == 1000 + 2 * 4 * 10
    assert dataclasses.replace(found, unit=5).sharded_bytes(0.5, 4) == 1000 + 3 * 4 * 5 + 4 * 10


def one_product(model):
    return model(torch.randn(1, 1)).sum()


def test_blocks_that_ran_before_without_gradients_are_gathered_once_more(measured):
    """FSDP2 fetches ahead what the forward called before, which is the last block of the pass without gradients."""

    def twice(model):
        with torch.no_grad():
            step(model)
        return step(model)

    found = measure(Net, twice, "fp32", (Block,))
    assert (measured.astray, found.astray) == (0, BLOCK)
    more = plan_of(found, "fsdp", 2).traffic_bytes - plan_of(measured, "fsdp", 2).traffic_bytes
    assert more == 4 * (LAYERS * BLOCK + BLOCK) / 2


def test_copies_of_a_sharded_model_gather_among_fewer_ranks(measured):
    """Two nodes, a copy on each: only gradients, of a shard each, go over the network."""
    flat, copies = plan_of(measured, "fsdp", 16), plan_of(measured, "fsdp", 16, replicas=2)
    assert copies.memory["weights"] == -(-4 * PARAMETERS // 8)
    gathered = 7 / 8 * (4 * PARAMETERS + 2 * 4 * PARAMETERS - 4 * measured.root)
    assert copies.traffic_bytes == pytest.approx(gathered + 4 * PARAMETERS / 8, abs=1)
    assert "within a node" in describe(copies) and "between nodes" in describe(flat)
    with pytest.raises(UserError, match="do not divide"):
        plan_of(measured, "fsdp", 16, replicas=3)


def test_checkpoints_hold_weights_moments_and_average(measured):
    assert plan_of(measured).checkpoint_bytes == 12 * PARAMETERS
    assert plan_of(measured, ema_decay=0.9).checkpoint_bytes == 16 * PARAMETERS


def test_fsdp_keeps_whole_gradients_between_the_micro_steps_of_a_step(measured):
    """As measured on two ranks: tests/shared/test_strategies.py."""
    size, world = 4 * PARAMETERS, 4
    once = plan_of(measured, "fsdp", world)
    late = plan_of(measured, "fsdp", world, gradient_accumulation_steps=3)
    each = plan_of(measured, "fsdp", world, gradient_accumulation_steps=3, reduce_each_micro_step=True)
    assert [plan.memory["gradients"] for plan in (once, late, each)] == [size // world, size, size // world]
    assert each.traffic_bytes - late.traffic_bytes == 2 * size * (world - 1) // world  # two more reduce-scatters


def test_a_start_holds_one_whole_unit_of_a_sharded_model_and_every_rank_s_model_on_the_host(measured):
    whole = 4 * PARAMETERS
    plans = {name: plan_of(measured, name, 16, ema_decay=0.9) for name in ("ddp", "fsdp")}
    assert plans["ddp"].startup_bytes == whole
    assert plans["fsdp"].startup_bytes == -(-whole // 16) + measured.block_bytes
    in_parts = make_plan(
        "toy", measured, run=RunSection(), training=TrainingSection(), strategy="fsdp", world=16, starts_in_parts=True
    )
    assert plans["fsdp"].host_bytes == 8 * whole and in_parts.host_bytes == in_parts.checkpoint_bytes  # its staging
    for in_fp32 in (False, True):
        once = make_plan(
            "toy", measured, run=RunSection(), training=TrainingSection(), strategy="fsdp", world=16, built_once=True,
            built_in_fp32=in_fp32,
        )  # fmt: skip
        assert once.host_bytes == max(measured.block_bytes, once.checkpoint_bytes)  # on rank 0's disk, then the staging
    assert plans["ddp"].host_bytes == max(8 * whole, 16 * PARAMETERS)  # eight ranks of a node; one checkpoint


def test_ranks_of_several_nodes_talk_at_the_network_s_speed(measured):
    one, two = plan_of(measured, "ddp", 8, gpu="h100"), plan_of(measured, "ddp", 16, gpu="h100")
    assert one.traffic_seconds == pytest.approx(one.traffic_bytes / 400e9)
    assert two.traffic_seconds == pytest.approx(two.traffic_bytes / 50e9)
    assert "within a node" in describe(one) and "at 50 GB/s (between nodes)" in describe(two)


def test_fp32_is_planned_at_the_speed_that_it_runs_at(measured):
    fast, slow = plan_of(measured), plan_of(measured, allow_tf32=False)
    assert slow.compute_seconds / fast.compute_seconds == pytest.approx(156 / 19.5)
    encoder = FrozenPart("VAE", 7, 8, 1e12, precision="fp32")
    mixed = plan_of(measured, precision="bf16", frozen_parts=[encoder])
    alone = plan_of(measured, precision="bf16")
    assert mixed.compute_seconds - alone.compute_seconds == pytest.approx(1e12 / (0.4 * 156e12))


def test_the_optimizer_s_traffic_counts(measured):
    plan = plan_of(measured, ema_decay=0.9)
    assert plan.optimizer_seconds == pytest.approx(40 * PARAMETERS / 2039e9)
    assert plan.seconds_per_step == pytest.approx(plan.compute_seconds + plan.optimizer_seconds)
    assert plan_of(measured, "fsdp", 4).optimizer_seconds == pytest.approx(7 * PARAMETERS / 2039e9)


def test_frozen_encoders_activations_are_there_before_the_model_s(measured):
    large = FrozenPart("VAE", 7, 8, activations=10 * measured.live_bytes(0))
    assert plan_of(measured, "ddp", 2, frozen_parts=[large]).memory["activations"] == large.activations
    small = dataclasses.replace(large, activations=1)
    assert plan_of(measured, "ddp", 2, frozen_parts=[small]).memory["activations"] == measured.live_bytes(0)


def test_a_faster_gpu_and_more_ranks_shorten_the_step(measured):
    seconds = {gpu: plan_of(measured, gpu=gpu, precision="bf16").compute_seconds for gpu in ("a100", "h100", "H200")}
    assert seconds["a100"] == pytest.approx(measured.step_flops / (312e12 * 0.4))
    assert seconds["h100"] == seconds["H200"] < seconds["a100"]
    shared = plan_of(measured, "ddp", 2, batch_size=1, global_batch_size=2)
    assert shared.samples_per_step == 2 and shared.accumulation == 1


def test_what_cannot_be_planned_is_refused(measured):
    with pytest.raises(UserError, match="--gpu abacus: not in the table; use one of .*a100.*h100"):
        plan_of(measured, gpu="abacus")
    with pytest.raises(UserError, match="--strategy none plans for one rank, --world-size is 4"):
        plan_of(measured, "none", 4)
    with pytest.raises(UserError, match="not divisible"):
        plan_of(measured, "ddp", 3, global_batch_size=16)


def test_the_plan_as_text_says_what_fits(measured):
    text = describe(plan_of(measured, "ddp", 8, gpu="h100", precision="bf16", frozen_parts=[FrozenPart("VAE", 7, 8)]))
    for part in (f"{PARAMETERS:,} trainable", "VAE: 7 parameters", "under ddp on 8 ranks in bf16: fits h100 (80 GB)"):
        assert part in text
    large = dataclasses.replace(measured, trainable=10**10, trainable_bytes=4 * 10**10)
    assert "DOES NOT FIT" in describe(plan_of(large))
    assert "160.00 GB" in describe(plan_of(dataclasses.replace(large, live=())))


@pytest.mark.parametrize(
    ("device", "model"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H20-3e", "h20"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L20", "l20"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 3070 Ti", "3070-ti"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Ascend910B3", "910b"),
        ("NVIDIA GeForce RTX 3070", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A1000", None),
        ("NVIDIA A10G", None),
        ("", None),
    ],
)
def test_a_devices_own_name_finds_its_peaks(device, model):
    assert gpu_named(device) is (None if model is None else GPUS[model])
