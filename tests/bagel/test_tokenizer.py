"""Bytes and a tokenizer from a folder: marks are added when absent, and text that holds a mark stays text."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bagel.config import LanguageConfig, ModelConfig
from bagel.data.tokenizer import SPECIAL_STRINGS, ByteTokenizer, FolderTokenizer, load_tokenizer
from bagel.modules.transformer import LanguageModel
from shared.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer that knows one of the four marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.decoders import ByteLevel

    inner.decoder = ByteLevel()
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=["<|im_start|>"])
    outer.save_pretrained(tmp_path)
    return tmp_path


def test_bytes_go_round():
    tokenizer, text = ByteTokenizer(), "caf\u00e9 \u732b <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < 256 and len(set(vars(tokenizer.special).values())) == 4


def test_a_folder_tokenizer_gets_the_missing_marks(folder):
    tokenizer = FolderTokenizer(folder)
    ids = list(vars(tokenizer.special).values())
    assert ids == [256, 257, 258, 259] and tokenizer.vocab_size == 260
    assert tokenizer.decode([ids[0], *tokenizer.encode("a cat"), ids[1]]) == "a cat"


def test_marks_inside_a_text_are_read_as_text(folder):
    tokenizer = FolderTokenizer(folder)
    for mark in SPECIAL_STRINGS:
        ids = tokenizer.encode(f"a {mark} b")
        assert not set(ids) & set(vars(tokenizer.special).values()) and tokenizer.decode(ids) == f"a {mark} b"


def test_missing_and_too_large_tokenizers_are_refused(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError):
        FolderTokenizer(tmp_path_factory.mktemp("empty"))
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(ModelConfig(from_scratch=True))
    with pytest.raises(UserError, match="below the 260 ids"):
        load_tokenizer(ModelConfig(from_scratch=True, tokenizer=str(folder), language=LanguageConfig(vocab_size=200)))


def test_a_vocabulary_grows_but_never_shrinks():
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    model = LanguageModel(LanguageConfig(vocab_size=20, **sizes))
    former = model.lm_head.weight.detach().clone()
    model.resize_vocabulary(12)
    assert model.lm_head.weight.shape == (20, 8)
    model.resize_vocabulary(23)
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (23, 8)
    assert (model.lm_head.weight[:20] == former).all()
