"""Retrieval and classification measures, in fp32 and block by block.

Legend: Q queries, C candidates, E embedding width.
"""

import numpy as np
import torch
from torch import Tensor

from shared.engine.dist import DistInfo, gather_objects

QUERY_BLOCK, BLOCK = 1024, 4096
RECALLS = (1, 5, 10)
BOOTSTRAPS = 1000


def ranks_of_targets(queries_QE: Tensor, candidates_CE: Tensor, targets: list[list[int]]) -> list[np.ndarray]:
    """0-based ranks of each query's relevant candidates, ascending.

    Larger scores first, equal ones by ascending index, so that constant embeddings do not score 100 %; what cannot be
    compared, such as NaN, ranks last. Never holds more than 1,024 queries against 4,096 candidates.
    """
    device = candidates_CE.device
    ranks: list[np.ndarray] = []
    for start in range(0, len(queries_QE), QUERY_BLOCK):
        queries = queries_QE[start : start + QUERY_BLOCK].float()
        own = targets[start : start + QUERY_BLOCK]
        row = torch.tensor([i for i, wanted in enumerate(own) for _ in wanted], device=device)
        column = torch.tensor([j for wanted in own for j in wanted], device=device)
        score = torch.empty(len(row), device=device)
        blocks = [
            (first, candidates_CE[first : first + BLOCK].float()) for first in range(0, len(candidates_CE), BLOCK)
        ]
        for first, block in blocks:  # the target's score must come from the same product as the others
            scores = queries @ block.T
            inside = (column >= first) & (column < first + len(block))
            score[inside] = scores[row[inside], column[inside] - first]
        better = torch.zeros(len(row), dtype=torch.int64, device=device)
        for first, block in blocks:
            scores = (queries @ block.T)[row]
            index = torch.arange(first, first + len(block), device=device)
            behind = (scores < score[:, None]) | ((scores == score[:, None]) & (index[None] >= column[:, None]))
            better += (~behind).sum(1)
        lengths = [len(wanted) for wanted in own]
        worst = len(candidates_CE) - 1
        ranks += [np.sort(part.clamp(max=worst).cpu().numpy()) for part in better.split(lengths)]
    return ranks


def summarise(
    ranks: list[np.ndarray], owners: list[int] | None = None, *, seed: int = 0, intervals: bool = True
) -> dict[str, float]:
    """R@1, R@5, R@10 (best relevant candidate) with 95 % intervals, median and mean rank (from 1), MRR and mAP@10.

    owners: the item that each query belongs to. The intervals draw whole items, since the captions of one picture
    are found or missed together; None: each query for itself.
    """
    best = np.array([ranked[0] for ranked in ranks])
    found = {f"R@{k}": float((best < k).mean()) for k in RECALLS}
    found |= {
        "median_rank": float(np.floor(np.median(best)) + 1),
        "mean_rank": float(best.mean() + 1),
        "MRR": float((1 / (best + 1)).mean()),
        "mAP@10": float(np.mean([average_precision_at(ranked) for ranked in ranks])),
    }
    if not intervals:
        return found
    groups = np.unique(np.arange(len(best)) if owners is None else np.array(owners), return_inverse=True)[1]
    sizes = np.bincount(groups)
    draws = np.random.default_rng(seed).integers(0, len(sizes), (BOOTSTRAPS, len(sizes)))
    for k in RECALLS:
        hits = np.bincount(groups, best < k)
        low, high = np.quantile(hits[draws].sum(1) / sizes[draws].sum(1), (0.025, 0.975))
        found |= {f"R@{k}_low": float(low), f"R@{k}_high": float(high)}
    return found


def average_precision_at(ranks: np.ndarray, limit: int = 10) -> float:
    """Sum over relevant ranks r_i < limit, ascending, of i / (r_i + 1), over min(number relevant, limit)."""
    hits = sum((i + 1) / (rank + 1) for i, rank in enumerate(np.sort(ranks)) if rank < limit)
    return float(hits / min(len(ranks), limit))


def retrieval(
    items_IE: Tensor, captions_CE: Tensor, owners: list[int], *, info: DistInfo | None = None, intervals: bool = True
) -> dict[str, dict[str, float]]:
    """Both directions; owners[c] is the item of caption c. An item may have several captions, each caption has one
    item.

    info: ranks that each take a part of the queries, all with the same embeddings; a collective then.
    """
    captions_of: list[list[int]] = [[] for _ in range(len(items_IE))]
    for caption, owner in enumerate(owners):
        captions_of[owner].append(caption)
    to_text = _ranks_over_ranks(items_IE, captions_CE, captions_of, info)
    to_item = _ranks_over_ranks(captions_CE, items_IE, [[owner] for owner in owners], info)
    return {
        "item_to_text": summarise(to_text, intervals=intervals),
        "text_to_item": summarise(to_item, owners, intervals=intervals),
    }


def _ranks_over_ranks(
    queries_QE: Tensor, candidates_CE: Tensor, targets: list[list[int]], info: DistInfo | None
) -> list[np.ndarray]:
    if info is None:
        return ranks_of_targets(queries_QE, candidates_CE, targets)
    share = -(-len(targets) // info.world)
    own = slice(info.rank * share, (info.rank + 1) * share)
    found = ranks_of_targets(queries_QE[own].to(info.device), candidates_CE.to(info.device), targets[own])
    return [ranks for part in gather_objects(found) for ranks in part]


def chance_recall(candidates: int, k: int, relevant: int = 1) -> float:
    """R@k of a random order: 1 - C(candidates - relevant, k) / C(candidates, k)."""
    miss = 1.0
    for i in range(min(k, candidates)):
        miss *= max(0, candidates - relevant - i) / (candidates - i)
    return 1 - miss


def chances(items: int, owners: list[int]) -> dict[str, dict[str, float]]:
    """R@k of a random order for both directions: an item with five captions finds one of them more easily."""
    captions = np.bincount(np.array(owners, dtype=np.int64), minlength=items)
    return {
        "text_to_item": {f"R@{k}": chance_recall(items, k) for k in RECALLS},
        "item_to_text": {
            f"R@{k}": float(np.mean([chance_recall(len(owners), k, int(count)) for count in captions])) for k in RECALLS
        },
    }


def mean_average_precision(scores_QC: np.ndarray, labels_QC: np.ndarray) -> float:
    """Mean over the classes that have a positive of the average precision over all samples; ties in ascending index."""
    found = []
    for scores, labels in zip(scores_QC.T, labels_QC.T.astype(bool), strict=True):
        if labels.any():
            ranked = labels[np.argsort(-scores, kind="stable")]
            precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
            found.append(precision[ranked].mean())
    return float(np.mean(found)) if found else float("nan")


def micro_f1(logits_QC: np.ndarray, labels_QC: np.ndarray) -> float:
    """F1 over all decisions together, a class said present at probability 0.5 (logit 0)."""
    said, true = logits_QC > 0, labels_QC.astype(bool)
    both = (said & true).sum()
    return float(2 * both / max(1, said.sum() + true.sum()))
