"""BLEU, ROUGE, METEOR and BERTScore of texts, with Chinese scored by characters; and n-gram baselines for the language
loss.

Every metric is a function (hypotheses, references) -> dict of figures; one that cannot be computed raises Unavailable
with the reason, which the report shows beside a null.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shared.errors import UserError, load_whole, opening


class Unavailable(Exception):
    """A metric that cannot be computed here, and why."""


def is_cjk(character: str) -> bool:
    """Chinese, Japanese or Korean: written without spaces between words."""
    code = ord(character)
    return 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x3040 <= code <= 0x30FF or 0xAC00 <= code <= 0xD7AF


def words(text: str) -> list[str]:
    """Lower-case words; every CJK character is a word of its own."""
    pieces, current = [], ""
    for character in text.lower():
        if is_cjk(character):
            pieces += [current, character]
            current = ""
        elif character.isalnum():
            current += character
        else:
            pieces.append(current)
            current = ""
    return [piece for piece in [*pieces, current] if piece]


def checked(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Refuse lists that do not belong together; an empty hypothesis is allowed and scores 0."""
    if not references:
        raise ValueError("there is no reference text to compare with")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU 0..100 (sacrebleu), tokenizer zh when most references are Chinese, else 13a; and its signature."""
    import sacrebleu

    checked(hypotheses, references)
    chinese = sum(any(map(is_cjk, text)) for text in references) * 2 > len(references)
    scorer = sacrebleu.BLEU(tokenize="zh" if chinese else "13a")
    return {
        "bleu": scorer.corpus_score(list(hypotheses), [list(references)]).score,
        "bleu_signature": str(scorer.get_signature()),
    }


class _CharacterAwareTokenizer:
    """For rouge-score, whose own tokenizer drops everything but a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 0..1 of ROUGE-1, -2, -L and -Lsum."""
    from rouge_score.rouge_scorer import RougeScorer

    checked(hypotheses, references)
    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = RougeScorer(list(kinds), tokenizer=_CharacterAwareTokenizer())
    scores = [scorer.score(reference, hypothesis) for hypothesis, reference in zip(hypotheses, references, strict=True)]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}


def meteor(hypotheses: Sequence[str], references: Sequence[str], nltk_data: str | None = None) -> dict[str, float]:
    """Mean METEOR 0..1 (nltk). Without WordNet only equal words and stems match: `meteor_no_wordnet`."""
    try:
        import nltk
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError:
        raise Unavailable("METEOR needs nltk: pip install nltk") from None
    checked(hypotheses, references)
    if nltk_data:
        nltk.data.path.insert(0, nltk_data)
    try:
        from nltk.corpus import wordnet

        wordnet.synsets("picture")
        name, extra = "meteor", {}
    except LookupError:
        name, extra = "meteor_no_wordnet", {"wordnet": _NoWordNet()}
    scores = [
        single_meteor_score(words(reference), words(hypothesis), **extra) if words(hypothesis) else 0.0
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    return {name: sum(scores) / len(scores)}


class _NoWordNet:
    """Stands where METEOR looks for synonyms, and knows none."""

    def synsets(self, word: str) -> list:
        return []


class BertScorer:
    """An encoder in a local folder, and which of its layers' states are compared; null: the last. Never downloads.

    UserError: the folder holds no encoder, or it has no such layer.
    """

    def __init__(self, folder: str, layer: int | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        with opening(f"--bertscore-model {folder}", "the folder holds no such model; give another"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.encoder: Any = load_whole(AutoModel, folder, local_files_only=True).eval()
        self.layer, count = -1 if layer is None else layer, len(self._states("a"))
        if not -count <= self.layer < count:
            raise UserError(f"--bertscore-layer {layer}: {folder} has none such; give 0 to {count - 1}")

    def embed(self, text: str) -> torch.Tensor:
        """Unit vectors (tokens, D) of a text."""
        return torch.nn.functional.normalize(self._states(text)[self.layer][0], dim=-1)

    @torch.no_grad()
    def _states(self, text: str) -> tuple[torch.Tensor, ...]:
        inputs = self.tokenizer(text, return_tensors="pt", truncation=True)
        return self.encoder(**inputs, output_hidden_states=True).hidden_states


def bert_score(hypotheses: Sequence[str], references: Sequence[str], scorer: BertScorer | None) -> dict[str, float]:
    """Mean F1 of greedy cosine matching of contextual embeddings (Zhang et al. 2020)."""
    if scorer is None:
        raise Unavailable("BERTScore needs a local model: --bertscore-model FOLDER")
    checked(hypotheses, references)
    scores = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        if not hypothesis.strip():
            scores.append(0.0)
            continue
        similarity = scorer.embed(hypothesis) @ scorer.embed(reference).T
        precision, recall = similarity.amax(dim=1).mean().item(), similarity.amax(dim=0).mean().item()
        scores.append(2 * precision * recall / max(1e-12, precision + recall))
    return {"bertscore_f1": sum(scores) / len(scores)}


# --- baselines --------------------------------------------------------------------------------------------------------


DISCOUNT = 0.75  # of every count above the lowest order


class NGram:
    """An interpolated Kneser-Ney model of token sequences (Kneser and Ney 1995), with a mark before the first token:
    the most that counting alone can do.

    A lower order counts in how many contexts a token was seen. The lowest order is mixed with the uniform distribution
    by the rule of Witten and Bell (1991).
    """

    def __init__(self, sequences: Sequence[Sequence[int]], order: int, vocabulary: int):
        self.order, self.vocabulary = order, vocabulary
        self.counts: dict[tuple, Counter] = defaultdict(Counter)
        for sequence in sequences:
            marked = [None, *sequence]
            for position in range(1, len(marked)):
                self.counts[tuple(marked[max(0, position - order + 1) : position])][marked[position]] += 1
        for length in range(order - 1, 0, -1):
            for context in [context for context in self.counts if len(context) == length]:
                self.counts[context[1:]].update(self.counts[context].keys())

    def probability(self, context: Sequence[int], token: int) -> float:
        """P(token | the last order - 1 of all tokens before it)."""
        probability = 1 / self.vocabulary
        marked = [None, *context]
        for length in range(min(self.order - 1, len(marked)) + 1):
            seen = self.counts.get(tuple(marked[len(marked) - length :]))
            if not seen:
                break
            total, kinds = seen.total(), len(seen)
            if length == 0:
                probability = (seen[token] + kinds * probability) / (total + kinds)
            else:
                probability = (max(seen[token] - DISCOUNT, 0) + DISCOUNT * kinds * probability) / total
        return probability

    def nats(self, sequences: Sequence[Sequence[int]]) -> float:
        """Mean negative log probability of a token."""
        total = [
            -math.log(self.probability(sequence[:position], token))
            for sequence in sequences
            for position, token in enumerate(sequence)
        ]
        return sum(total) / len(total)


def ngram_baselines(
    train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], vocabulary: int
) -> dict[str, float]:
    """Nats a token of 1- to 4-grams fitted to the training answers."""
    names = ("unigram", "bigram", "3-gram", "4-gram")
    return {name: NGram(train, order, vocabulary).nats(held_out) for order, name in enumerate(names, start=1)}


def guarded(metric: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """The metric's figures, or {name: None, name_reason: why}."""
    try:
        return metric()
    except (Unavailable, ImportError) as reason:
        return {name: None, f"{name}_reason": str(reason)}
