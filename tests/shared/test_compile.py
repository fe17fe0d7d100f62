"""torch.compile of each block: one whole graph, and none compiled again after the second step.

Counted by dynamo with the eager backend, which needs no compiler. BAGEL is not in the list: its attention, which calls
one kernel for each split of a pack, stands outside of the graphs.
"""

import importlib

import pytest
import torch
from torch._dynamo.utils import counters

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
