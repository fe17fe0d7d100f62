"""torch.compile of each block: one whole graph, and none compiled again after the second step.

Counted by dynamo with the eager backend, which needs no compiler. Of BAGEL a language layer and a layer of the vision
tower with flex attention, as on a GPU, and their forward pass alone: flex attention has no backward on a CPU. The
kernels by samples and by images, which are for a CPU, stand outside of the graphs.
"""

import importlib

import pytest
import torch
from torch._dynamo.utils import counters

from bagel.config import LanguageConfig, VisionConfig
from bagel.modules.transformer import MoTDecoderLayer, PackedAttention, PackLayout, Rows
from bagel.modules.vision import EncoderLayer, WithinImages
from shared.engine.strategy import blocks_of


@pytest.mark.slow
@pytest.mark.parametrize("system", ["dit", "float", "multimodal", "opens2v"])
def test_blocks_compile_whole_and_once(system):
    bench = importlib.import_module(f"scripts.bench.{system}")
    config = bench.settings("small")
    workload = bench.workload(config)
    torch.manual_seed(0)
    model = workload.build(config).train()
    torch._dynamo.reset()
    counters.clear()
    blocks = blocks_of(model, workload.blocks)
    assert blocks
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
    loss = workload.step(config)
    graphs = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model)
        value.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert graphs[0] > 0 and graphs[1] == graphs[2] == graphs[3], graphs


PACKS = [  # lengths of samples, of their splits, and modes: 110 tokens at most, padded to 128
    ([60, 50], [20, 40, 50], ["causal", "noise", "causal"]),
    ([30, 70], [30, 30, 40], ["causal", "causal", "full"]),
    ([44, 52, 4], [44, 52, 4], ["causal", "full", "causal"]),
    ([10, 100], [10, 40, 60], ["causal", "causal", "noise"]),
]


@pytest.mark.slow
@torch._dynamo.config.patch(assume_static_by_default=False)  # as UnifiedTrainer sets it
def test_a_layer_of_bagel_is_one_graph_with_its_flex_attention():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    layer = MoTDecoderLayer(
        LanguageConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    ).requires_grad_(False)
    plain, graphs = layer.forward, []
    layer.compile(fullgraph=True, backend="eager")
    for lens, splits, modes in PACKS:
        noise = torch.tensor([mode == "noise" for mode, count in zip(modes, splits, strict=True) for _ in range(count)])
        rows, layout = Rows(torch.where(~noise)[0], torch.where(noise)[0]), PackLayout(lens, splits, modes, 128)
        und, gen = (torch.randn(len(place), 64) for place in (rows.und, rows.gen))
        angles = tuple(tuple(torch.randn(2, len(x), 16)) for x in (und, gen))
        found = layer(und, gen, angles, PackedAttention(layout, rows, "flex"), 0)
        graphs.append(counters["stats"]["unique_graphs"])
        for one, other in zip(found, plain(und, gen, angles, PackedAttention(layout, rows, "dense"), 0), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert not counters["graph_break"] and graphs[0] > 0 and graphs[1] == graphs[3], graphs


@pytest.mark.slow
@torch._dynamo.config.patch(assume_static_by_default=False)
def test_a_layer_of_bagels_vision_tower_is_one_graph():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    layer = EncoderLayer(VisionConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, patch_size=14))
    layer.requires_grad_(False)
    plain, graphs = layer.forward, []
    layer.compile(fullgraph=True, backend="eager")
    for lengths in ([16, 16], [9, 150, 16], [4, 4, 9], [300, 2, 20]):  # pictures of a pack
        x = torch.randn(sum(lengths), 64)
        angles = tuple(torch.randn(2, len(x), 16))
        found = layer(x, WithinImages(lengths, flex=x.device), angles)
        graphs.append(counters["stats"]["unique_graphs"])
        torch.testing.assert_close(found, plain(x, WithinImages(lengths), angles), atol=1e-6, rtol=1e-6)
    assert not counters["graph_break"] and graphs[0] > 0 and graphs[1] == graphs[3], graphs
