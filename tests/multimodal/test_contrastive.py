"""Contrastive losses on two ranks, duplicates, and the gradient cache."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist

from multimodal.modules.contrastive import contrastive_loss, positives
from multimodal.objective import hard_negatives, mask_words, masked_loss, split_by_mask
from tests.launching import run
from tests.multimodal import ranks
from tests.multimodal.golden import numbers, tensors

KINDS = {
    "infonce": ("clip", "clip.ddp.local_loss=True_gather_with_grad=True"),
    "siglip": ("siglip", "siglip.ddp.dist_impl=gather"),
}
CACHES = [(kind, duplicates) for kind in KINDS for duplicates in (False, True)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """All cases in one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [
        {"what": "golden", "kind": kind, "name": name, "output": str(folder / kind)}
        for kind, (name, _) in KINDS.items()
    ]
    cases += [
        {"what": "cache", "kind": kind, "duplicates": duplicates, "output": str(folder / f"cache_{kind}_{duplicates}")}
        for kind, duplicates in CACHES
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    run(2, "tests/multimodal/ranks.py", str(folder / "cases.json"))
    return folder


@pytest.fixture
def one_rank(monkeypatch):
    """A process group of one, for the functions of ranks.py."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setitem(os.environ, name, value)
    torch_dist.init_process_group("gloo", store=torch_dist.HashStore(), rank=0, world_size=1)
    yield
    torch_dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_agree_with_the_recorded_losses_and_gradients(two_ranks, kind):
    name, case = KINDS[kind]
    expected, data = numbers("contrastive_loss")["scalars"], tensors("contrastive_loss")
    found = [json.loads((two_ranks / f"{kind}.{rank}").read_text()) for rank in (0, 1)]
    assert [part["loss"] for part in found] == pytest.approx(expected[case]["loss_per_rank"], abs=1e-5)
    assert sum(part["loss"] for part in found) / 2 == pytest.approx(expected[f"{name}.single"]["loss"], abs=1e-5)
    assert [part["scale"] for part in found] == pytest.approx(expected[case]["grad_log_logit_scale_per_rank"], abs=1e-5)
    if kind == "siglip":
        assert [part["bias"] for part in found] == pytest.approx(expected[case]["grad_logit_bias_per_rank"], abs=1e-5)
    for modality in ("image", "text"):
        gradient = torch.cat([torch.tensor(part[modality]) for part in found])
        assert torch.allclose(gradient, data[f"{case}.grad_{modality}"], atol=1e-5)
        assert torch.allclose(gradient / 2, data[f"{name}.single.grad_{modality}"], atol=1e-5)


def close(found: dict) -> None:
    for name, whole in found["whole"].items():
        cached = torch.tensor(found["cached"][name], dtype=torch.float64)
        scale = max(1e-3, torch.tensor(whole).abs().max().item())
        assert (cached - torch.tensor(whole, dtype=torch.float64)).abs().max().item() < 1e-6 * scale + 1e-7, name


@pytest.mark.distributed
@pytest.mark.parametrize("kind,duplicates", CACHES)
def test_the_cache_equals_the_big_batch_on_two_ranks(two_ranks, kind, duplicates):
    for rank in (0, 1):
        close(json.loads((two_ranks / f"cache_{kind}_{duplicates}.{rank}").read_text()))


@pytest.mark.parametrize("kind,duplicates", CACHES)
def test_the_cache_equals_the_big_batch_on_one_rank(one_rank, kind, duplicates):
    close(
        {
            name: ranks.cached_gradients(kind, cached, duplicates)
            for name, cached in (("cached", True), ("whole", False))
        }
    )


def test_duplicates_share_the_target():
    keys = torch.tensor([[1, 10], [1, 11], [3, 12], [4, 12]])
    same = positives(keys, keys, 0)
    assert same.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    features = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale, bias = torch.tensor(5.0), torch.tensor(0.0)
    logits = scale * features @ features.T
    target = same.float() / 2
    expected = -((target * logits.log_softmax(1)).sum(1).mean() + (target * logits.T.log_softmax(1)).sum(1).mean()) / 2
    assert contrastive_loss("infonce", features, features, scale, bias, keys).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_hard_negatives_are_wrong_and_follow_the_similarity():
    torch.manual_seed(0)
    own = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    keys = torch.tensor([[i, i] for i in range(6)])
    keys[3, 0] = keys[2, 0]  # 2 and 3 have one caption
    for draw in torch.linspace(0, 0.999999, 23):
        chosen, valid = hard_negatives(own, own, torch.tensor(3.0), keys, torch.full((6,), float(draw)))
        assert (
            valid.all() and (chosen != torch.arange(6)).all() and chosen[2] != 3 and chosen[3] != 2 and chosen.max() < 6
        )
    scores = 3 * own @ own.T
    chances = scores.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).softmax(1)
    draws = [
        hard_negatives(own, own, torch.tensor(3.0), torch.arange(12).view(6, 2), torch.rand(6))[0] for _ in range(4000)
    ]
    seen = torch.nn.functional.one_hot(torch.stack(draws), 6).float().mean(0)
    assert (seen - chances).abs().max() < 0.04
    _, valid = hard_negatives(own[:2], own[:2], torch.tensor(3.0), torch.tensor([[1, 1], [1, 2]]), torch.rand(2))
    assert not valid.any()


def test_masks_hide_the_stated_share_and_the_loss_sees_hidden_patches_alone():
    keep, restore, hidden = split_by_mask(torch.rand(5, 196, generator=torch.Generator().manual_seed(1)), 0.75)
    assert keep.shape == (5, 49) and (hidden.sum(1) == 147).all()
    assert not hidden.gather(1, keep).any()
    assert torch.equal(restore.gather(1, keep), torch.arange(49).expand(5, -1))
    patches, predicted = torch.randn(5, 196, 12), torch.zeros(5, 196, 12)
    loss = masked_loss(predicted, patches, hidden)
    assert loss.item() == pytest.approx(1.0, abs=1e-3)  # normalised targets have mean square 1
    predicted[~hidden] = 100.0
    assert masked_loss(predicted, patches, hidden).item() == pytest.approx(loss.item())


def test_masked_words_follow_the_80_10_10_rule():
    ids = torch.full((400, 40), 77)
    ids[:, 0], ids[:, 30:] = 1, 0
    shown, chosen = mask_words(ids, torch.rand(400, 3, 80, generator=torch.Generator().manual_seed(2)), 16384)
    assert not chosen[:, 0].any() and not chosen[:, 30:].any() and torch.equal(shown[~chosen], ids[~chosen])
    assert chosen[:, 1:30].float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (shown[chosen] == 3).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (shown[chosen] == 77).float().mean().item() == pytest.approx(0.1, abs=0.03)
