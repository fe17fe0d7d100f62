"""UMT5 reads texts no further than they go; the rows behind are zero."""

from types import SimpleNamespace

import torch
from transformers import UMT5Config, UMT5EncoderModel

from opens2v.modules.encoders import HashText, UMT5Text


def by_words(texts, *, padding, max_length, **_):
    """A tokenizer of one number a word, with the end mark 1 and padding 0."""
    ids = [[2 + sum(map(ord, word)) % 60 for word in text.split()][: max_length - 1] + [1] for text in texts]
    length = max_length if padding == "max_length" else max(map(len, ids))
    rows = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    return SimpleNamespace(input_ids=rows, attention_mask=(rows > 0).long())


def test_rows_equal_those_of_a_full_length_and_are_zero_behind_the_text():
    torch.manual_seed(0)
    size = dict(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=2)
    encoder = UMT5EncoderModel(UMT5Config(**size)).eval()
    texts = ["a cat walks on a wall", "a dog", ""]
    rows = UMT5Text(encoder, by_words, rows=12)(texts)
    full = by_words(texts, padding="max_length", max_length=12)
    with torch.no_grad():
        expected = encoder(full.input_ids, attention_mask=full.attention_mask).last_hidden_state
    assert rows.shape == (3, 12, 16)
    torch.testing.assert_close(rows, expected * full.attention_mask[..., None], atol=1e-6, rtol=1e-5)
    assert [int(row.abs().sum(-1).count_nonzero()) for row in rows] == [7, 3, 1]
    assert UMT5Text(encoder, by_words, rows=4)(texts).shape == (3, 4, 16)


def test_hashed_words_tell_which_came_before_when_ordered():
    left, right = "it moves from left to right", "it moves from right to left"
    plain, ordered = (HashText(16, 8, ordered=order)([left, right]) for order in (False, True))
    assert torch.equal(plain[0].sort(0).values, plain[1].sort(0).values), "the same set of rows"
    assert (ordered[0].sort(0).values - ordered[1].sort(0).values).abs().max() > 0.1
    assert torch.equal(ordered[0, :4], ordered[1, :4].where(torch.arange(4)[:, None] < 3, ordered[0, :4]))
    assert ordered[:, 6:].abs().max() == 0
