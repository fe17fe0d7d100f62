"""Which sample comes when, on any number of ranks and loader processes, and what becomes of broken ones."""

import json

import pytest
import torch

from shared.data import BatchPlan, MapStream, ReadAhead, to_device
from shared.engine.dist import DistInfo
from shared.errors import BadSample, UserError
from shared.rng import keyed_generator

LAYOUTS = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)]  # (ranks, accumulation)


def step_indices(plan, step):
    """The samples of one step, in the order of their slots."""
    keys = [
        key for micro in range(plan.accumulation) for rank in range(plan.world) for key in plan.keys(step, micro, rank)
    ]
    assert sorted(key.slot for key in keys) == list(range(plan.global_batch))
    return [key.index for key in sorted(keys, key=lambda key: key.slot)]


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "accumulation"), LAYOUTS)
def test_an_epoch_is_a_permutation(world, accumulation):
    plan = BatchPlan(48, 2, world, accumulation, seed=5)
    steps = plan.steps_per_epoch
    assert steps == 48 // (2 * world * accumulation)
    epochs = [[i for step in range(e * steps, (e + 1) * steps) for i in step_indices(plan, step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_one_rank_and_several_see_the_same_global_batches():
    plans = [BatchPlan(50, 12 // (w * a), w, a, seed=5) for w, a in [(1, 1), (1, 3), (2, 1), (2, 3), (3, 1), (3, 4)]]
    for step in (0, 3, 4, 9, 3):  # also backwards, and over the ends of epochs
        assert len({tuple(step_indices(plan, step)) for plan in plans}) == 1


def test_the_seed_decides_the_order():
    orders = [step_indices(BatchPlan(100, 50, seed=seed), 0) for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]
    assert step_indices(BatchPlan(10, 5, shuffle=False), 1) == [5, 6, 7, 8, 9]


def test_drop_last_leaves_out_the_tail_and_otherwise_a_batch_runs_on():
    dropping, wrapping = BatchPlan(10, 4), BatchPlan(10, 4, drop_last=False)
    assert (dropping.steps_per_epoch, wrapping.steps_per_epoch) == (2, 3)
    assert len({*step_indices(dropping, 0), *step_indices(dropping, 1)}) == 8
    assert [key.epoch for key in dropping.keys(2, 0, 0)] == [1] * 4
    assert [key.epoch for key in wrapping.keys(2, 0, 0)] == [0, 0, 1, 1]
    first = [i for step in range(5) for i in step_indices(wrapping, step)]
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))


def test_a_set_smaller_than_a_batch_repeats_without_drop_last():
    keys = BatchPlan(3, 8, drop_last=False).keys(0, 0, 0)
    assert [key.epoch for key in keys] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(key.index for key in keys[:3]) == [0, 1, 2]


def test_too_small_a_set_is_refused_with_advice():
    with pytest.raises(UserError) as caught:
        BatchPlan(11, 2, 3, 2)
    message = str(caught.value)
    assert "has 11 samples" in message and "takes 12 (batch_size 2 x 3 ranks x 2 micro-steps)" in message
    assert "smaller --batch-size" in message
    with pytest.raises(UserError, match="the data set is empty"):
        BatchPlan(0, 1, drop_last=False)


# --- stream -----------------------------------------------------------------------------------------------------------


class Numbers:
    """Samples with keyed augmentation; some cannot be read, one folder is gone."""

    fingerprint = "numbers"

    def __init__(self, length=40, bad=(), missing=()):
        self.length, self.bad, self.missing = length, set(bad), set(missing)

    def __len__(self):
        return self.length

    def sample(self, index, epoch):
        if index in self.bad:
            raise BadSample(f"number {index} is broken")
        if index in self.missing:
            raise FileNotFoundError(2, "No such file or directory", f"number_{index}.txt")
        noise = torch.rand((), generator=keyed_generator(1, epoch, index))
        return {"index": index, "value": index + noise, "threads": torch.get_num_threads()}


def collate(items):
    return {
        "index": torch.tensor([item["index"] for item in items]),
        "value": torch.stack([item["value"] for item in items]),
    }


def stream_of(dataset, *, rank=0, world=1, batch=4, accumulation=1, workers=0, **options):
    plan = BatchPlan(len(dataset), batch, world, accumulation, seed=3)
    return MapStream(dataset, plan, DistInfo(rank, world), collate=collate, num_workers=workers, **options)


def draw(stream, steps, start=0):
    stream.start(start, None)
    try:
        return [stream.next_step() for _ in range(steps)]
    finally:
        stream.close()


def same(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_loader_processes_change_nothing():
    assert same(
        draw(stream_of(Numbers(bad=[7], length=200)), 12), draw(stream_of(Numbers(bad=[7], length=200), workers=2), 12)
    )


def test_reading_ahead_changes_nothing_and_counts_only_what_was_handed_out():
    class Counted:
        """Steps 1, 2, 3, and a UserError in place of the fourth."""

        count, closed = 0, False

        def next_step(self):
            self.count += 1
            if self.count == 4:
                raise UserError("no more")
            return [{"value": torch.tensor(self.count)}]

        def state(self):
            return {"count": self.count}

        def close(self):
            self.closed = True

    ahead = ReadAhead(Counted(), torch.device("cpu"))
    assert ahead.state() == {"count": 0}  # a run that is already done reads nothing
    for number in (1, 2, 3):
        assert ahead.next_step()[0]["value"] == number and ahead.state() == {"count": number}
    with pytest.raises(UserError, match="no more"):
        ahead.next_step()
    ahead.close()
    assert ahead.stream.closed and ahead.state() == {"count": 3}
    stream = stream_of(Numbers(), accumulation=2)
    stream.start(0, None)
    ahead = ReadAhead(stream, torch.device("cpu"))
    assert same([ahead.next_step() for _ in range(9)], draw(stream_of(Numbers(), accumulation=2), 9))
    ahead.close()


def test_starting_at_a_step_equals_running_to_it():
    straight = draw(stream_of(Numbers(), accumulation=2), 9)
    for step in (1, 4, 5, 8):
        assert same(draw(stream_of(Numbers(), accumulation=2), 9 - step, start=step), straight[step:])
    assert stream_of(Numbers()).state() == {}


def test_ranks_share_the_global_batch_of_one_rank():
    (whole,) = zip(*draw(stream_of(Numbers(), batch=12), 4), strict=True)
    ranks = [draw(stream_of(Numbers(), rank=rank, world=3, batch=2, accumulation=2), 4) for rank in range(3)]
    for step in range(4):
        micro = [batch for rank in ranks for batch in rank[step]]
        slots = torch.cat([batch["slot"] for batch in micro])
        values = torch.cat([batch["value"] for batch in micro])
        assert torch.equal(slots.sort().values, torch.arange(12))
        assert torch.equal(values[slots.argsort()], whole[step]["value"])
        assert torch.equal(whole[step]["slot"], torch.arange(12))


def test_a_broken_sample_is_replaced_the_same_way_each_time_and_listed(tmp_path):
    listed = tmp_path / "bad_samples.jsonl"
    dataset = Numbers(200, bad=[7, 90])
    first = draw(stream_of(dataset, bad_samples=listed), 100)
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == [7, 90]  # once each, though met twice
    assert all(row["reason"] == f"number {row['index']} is broken" for row in rows)
    assert same(first, draw(stream_of(dataset), 100))
    whole = draw(stream_of(Numbers(200)), 100)
    indices, undisturbed = (torch.cat([step[0]["index"] for step in run]) for run in (first, whole))
    replaced = torch.isin(undisturbed, torch.tensor([7, 90]))
    assert torch.equal(indices[~replaced], undisturbed[~replaced]) and replaced.sum() == 4
    assert not torch.isin(indices, torch.tensor([7, 90])).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_in_a_hundred_stops(tmp_path, workers):
    listed = tmp_path / "bad_samples.jsonl"
    stream = stream_of(Numbers(200, bad=[3, 50, 120]), bad_samples=listed, workers=workers)
    with pytest.raises(UserError) as caught:
        draw(stream, 50)
    message = str(caught.value)
    assert "3 of 200 samples cannot be read, more than 1%" in message and str(listed) in message
    assert "is broken" in message and "\n" not in message
    assert len(listed.read_text().splitlines()) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_that_cannot_be_read_at_all_says_so(workers):
    with pytest.raises(UserError, match="20 samples in a row cannot be read; the last: number") as caught:
        draw(stream_of(Numbers(40, bad=range(40)), workers=workers), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_another_error_arrives_as_it_was_raised(workers):
    with pytest.raises(FileNotFoundError) as caught:
        draw(stream_of(Numbers(40, missing=range(40)), workers=workers), 1)
    assert caught.value.filename.startswith("number_")


def test_a_data_set_with_plain_indexing_will_do():
    class Plain:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"index": index, "value": torch.tensor(float(index))}

    (step,) = draw(stream_of(Plain(), batch=8), 1)
    assert sorted(step[0]["index"].tolist()) == list(range(8))


def test_to_device_walks_nested_values():
    value = {"a": [torch.ones(2), "text"], "b": (torch.zeros(1), 3), "c": None}
    moved = to_device(value, torch.device("meta"))
    assert moved["a"][0].device.type == moved["b"][0].device.type == "meta"
    assert moved["a"][1] == "text" and moved["b"][1] == 3 and moved["c"] is None
