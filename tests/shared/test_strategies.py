"""Every strategy trains the same model; a run moves between strategies and numbers of ranks."""

import json
import shutil
from pathlib import Path

import pytest

from shared.engine.checkpoint import load_weights
from tests.launching import final_tensors, losses, run
from tests.shared.toy import error_file

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
TOY = Path(__file__).parent / "toy.py"
STRATEGIES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
# smooth: with a large epsilon Adam does not turn the rounding noise of a gradient near zero into a whole step, so that
# single weights can be compared; with the usual epsilon one weight in two thousand may differ by far more than the rest
VARIANTS = {
    "plain": ({}, 1, 1e-8),
    "accumulated": ({}, 4, 1e-8),
    "scattered": ({}, 4, 1e-8),  # accumulated, and fsdp scatters its gradients in every micro-step
    "tied": ({"tied": True}, 4, 1e-8),
    "smooth": ({}, 1, 1e-3),
    "meta": ({"meta": True, "tied": True}, 1, 1e-8),  # the model comes without memory and is filled part by part
    "once": ({"once": True, "tied": True}, 1, 1e-8),  # under fsdp rank 0 alone builds it
    "apart": ({"once": "apart", "tied": True}, 1, 1e-8),  # but where the ranks do not share a folder
}


def toy(folder: Path, world: int, cases: list[dict]) -> None:
    path = folder / f"cases_{world}_{len(list(folder.glob('cases_*')))}.json"
    path.write_text(json.dumps(cases))
    run(world, TOY, path)


def batches(key: str, samples: int, steps: int, epsilon: float) -> dict:
    sizes = {"batch_size": samples // steps, "gradient_accumulation_steps": steps, "adam_epsilon": epsilon}
    return sizes | {"reduce_each_micro_step": key == "scattered"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    toy(
        folder,
        1,
        [
            {"output_dir": str(folder / f"one_{key}"), "training": batches(key, 16, steps, epsilon), **extra}
            for key, (extra, steps, epsilon) in VARIANTS.items()
        ],
    )
    toy(
        folder,
        2,
        [
            {
                "output_dir": str(folder / f"{name}_{key}"),
                "strategy": name,
                "training": batches(key, 8, steps, epsilon),
                **extra,
            }
            for name in STRATEGIES
            for key, (extra, steps, epsilon) in VARIANTS.items()
        ]
        + [
            {
                "output_dir": str(folder / "ddp_in_bf16"),
                "strategy": "ddp",
                "run": {"ddp_bf16": True},
                "training": batches("", 8, 1, 1e-8),
            }
        ],
    )
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_give_the_losses_of_one(runs, strategy, variant):
    expected, found = losses(runs / f"one_{variant}"), losses(runs / f"{strategy}_{variant}")
    assert len(expected) == len(found) == 20
    # one unit in the last place of fp32 at loss 4 is 4.8e-7; the tolerance is relative to the loss
    assert max(abs(found[step] - expected[step]) / expected[step] for step in expected) < 1e-6


def test_gradients_averaged_in_bf16_differ_by_their_rounding_alone(runs):
    expected, found = losses(runs / "one_plain"), losses(runs / "ddp_in_bf16")
    errors = [abs(found[step] - expected[step]) / expected[step] for step in expected]
    assert len(found) == 20 and 1e-6 < max(errors) < 1e-2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_averaged_weights_equal_those_of_one_rank(runs, strategy):
    expected, found = final_tensors(runs / "one_smooth"), final_tensors(runs / f"{strategy}_smooth")
    names = [name for name in expected if name.startswith("ema.safetensors")]
    assert names and all((found[name] - expected[name]).abs().max() < 5e-7 for name in names)


def test_replicas_and_units_of_their_own_give_the_losses_of_one(tmp_path):
    settings = batches("", 16, 4, 1e-8) | {"total_steps": 8, "eval_steps": 4}
    toy(tmp_path, 1, [{"output_dir": str(tmp_path / "one"), "training": settings}])
    cases = {
        "hybrid": {"run": {"fsdp_replicas": 2}},
        "scattered": {"run": {"fsdp_replicas": 2}, "training": {"reduce_each_micro_step": True}},
        "replicas": {"run": {"fsdp_replicas": 4}, "meta": True},
        "units": {"units": ["table", "head"]},
    }
    shards = {"shard_checkpoints_above_gb": 0, "batch_size": 1, "max_steps": 6}
    for half in (shards, shards | {"max_steps": None}):
        toy(
            tmp_path,
            4,
            [
                {
                    "output_dir": str(tmp_path / name),
                    "strategy": "fsdp",
                    **case,
                    "training": {**settings, **case.get("training", {}), **half},
                }
                for name, case in cases.items()
            ],
        )
    expected = losses(tmp_path / "one")
    for name in cases:
        found = losses(tmp_path / name)
        assert max(abs(found[step] - expected[step]) / expected[step] for step in expected) < 1e-6, name
        expected_tensors = load_weights(tmp_path / "one")
        assert all(
            (value - expected_tensors[key]).abs().max() < 1e-4 for key, value in load_weights(tmp_path / name).items()
        )


def test_a_run_moves_between_strategies_and_numbers_of_ranks(tmp_path):
    settings = {"global_batch_size": 12, "batch_size": 2, "total_steps": 10}
    toy(tmp_path, 1, [{"output_dir": str(tmp_path / "straight"), "training": settings}])
    toy(
        tmp_path,
        2,
        [
            {"output_dir": str(tmp_path / name), "strategy": name, "training": {**settings, "max_steps": 5}}
            for name in STRATEGIES
        ],
    )
    moves = {1: [], 2: [], 3: []}  # every pair of strategies once, every source on every number of ranks
    for i, source in enumerate(STRATEGIES):
        for j, target in enumerate(STRATEGIES):
            moves[(i + j) % 3 + 1].append((source, target))
    expected = losses(tmp_path / "straight")
    for world, pairs in moves.items():
        for source, target in pairs:
            shutil.copytree(tmp_path / source, tmp_path / f"{source}_{target}")
        toy(
            tmp_path,
            world,
            [
                {"output_dir": str(tmp_path / f"{source}_{target}"), "strategy": target, "training": settings}
                for source, target in pairs
            ],
        )
        for source, target in pairs:
            found = losses(tmp_path / f"{source}_{target}")
            assert sorted(found) == sorted(expected)
            worst = max(abs(found[step] - expected[step]) / expected[step] for step in expected)
            assert worst < 1e-6, f"{source} on 2 ranks continued as {target} on {world}: {worst}"


@pytest.mark.parametrize("branches", ["divergent", "fixed_order"])
def test_ranks_that_run_other_modules_are_caught(tmp_path, branches):
    # slot parity decides the branch, and slots 0 and 1 lie on different ranks
    common = {"branches": branches, "training": {"batch_size": 1, "total_steps": 6}}
    cases = [
        {"output_dir": str(tmp_path / name), "strategy": name, "expect": branches == "divergent", **common}
        for name in (STRATEGIES[:4] if branches == "divergent" else STRATEGIES)
    ]
    toy(tmp_path, 2, cases)
    if branches == "divergent":
        for case in cases:
            for rank in (0, 1):
                text = error_file(case["output_dir"], rank).read_text()
                assert "branch_" in text and "has a gradient on rank" in text and "placeholder" in text
        return
    toy(
        tmp_path,
        1,
        [{"output_dir": str(tmp_path / "one"), **common, "training": {**batches("", 2, 2, 1e-8), "total_steps": 6}}],
    )
    expected = losses(tmp_path / "one")
    for case in cases:
        found = losses(Path(case["output_dir"]))
        assert max(abs(found[step] - expected[step]) / expected[step] for step in expected) < 1e-6


def test_ranks_with_other_settings_or_data_are_refused(tmp_path):
    kinds = {"other_settings": "settings", "other_data": "samples"}
    toy(tmp_path, 2, [{"output_dir": str(tmp_path / kind), kind: True, "expect": True} for kind in kinds])
    for kind, word in kinds.items():
        for rank in (0, 1):
            text = error_file(tmp_path / kind, rank).read_text()
            assert f"rank 1 has other {word} than rank 0" in text and "same command" in text


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_not_finite_is_skipped_by_all(tmp_path, strategy):
    toy(
        tmp_path,
        2,
        [
            {
                "output_dir": str(tmp_path / "run"),
                "strategy": strategy,
                "nan_at": 3,
                "training": {"batch_size": 2, "total_steps": 8},
            }
        ],
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [row["step"] for row in rows if row.get("train/skipped")]
    assert skipped == [4]
    after = [row["train/loss"] for row in rows if row["step"] > 4 and "train/loss" in row]
    assert len(after) == 4 and all(value is not None for value in after)
