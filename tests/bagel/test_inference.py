"""Use and evaluation: texts continued together, calls that draw anew, one pass for all times, bounded work."""

import json
import math
import types

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from bagel import metrics
from bagel.config import PRESETS, Config
from bagel.data.tokenizer import ByteTokenizer
from bagel.dataset import transforms_of
from bagel.evaluation.validation import TIMES, conversations, fixed_pack, held_out_losses, held_out_packs
from bagel.inferencer import InterleaveInferencer
from bagel.model import Bagel
from bagel.modules import transformer
from bagel.modules.transformer import (
    CAUSAL,
    FULL,
    NOISE,
    PackedAttention,
    PackLayout,
    Rows,
    flex_block_mask,
    flex_ids,
    flex_rule,
)
from bagel.objective import UnifiedTrainer, with_latents
from bagel.packing import Draws, Dropout, PackBuilder, PlanItem
from bagel.sampling.context import Context
from bagel.sampling.generation import Guidance, continue_text, extend, text_block
from bagel.train import main as train
from bagel.weights.pretrained import load_autoencoder
from shared.config import load_config
from shared.engine.dist import DistInfo
from shared.errors import UserError
from tests.bagel.conftest import LAYOUT, TINY

APPLE = {"text_prompt": "A red apple", "image_path": "images/apple.png"}
EDIT = {"source_image_path": "images/cat.png", "instruction": "red", "target_image_path": "images/apple.png"}
ASK = {"image_path": "images/cat.png", "question": "What?", "answer": "A cat."}
MARKS = ByteTokenizer.special


def inferencer_of(tiny, **settings) -> InterleaveInferencer:
    config, model = tiny
    vae, vit, edit = transforms_of(config.data, model.config)
    autoencoder = load_autoencoder(config.model)
    return InterleaveInferencer(
        model, autoencoder, ByteTokenizer(), vae, vit, MARKS, edit_vit_transform=edit, **settings
    )


# --- texts ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_whole_passes(model: Bagel, ids: list[int], count: int) -> list[int]:
    """Greedy continuation without any cache."""
    found = [MARKS.bos]
    for _ in range(count - 1):
        context = Context()
        extend(model, [context], [text_block(ids, MARKS)], store=True)
        block = text_block(found[1:], MARKS)
        block.text_ids.pop()  # the end mark
        logits = extend(model, [context], [block], store=False, want="logits")
        found.append(logits[-1].argmax().item())
    return found


@pytest.mark.parametrize("lengths", [[3], [3, 3], [9, 3, 17, 3]])
def test_cached_and_batched_texts_are_those_of_whole_passes(tiny, lengths):
    model, prompts = tiny[1], [list(range(40 + 5 * n, 40 + 5 * n + length)) for n, length in enumerate(lengths)]
    contexts = [Context() for _ in prompts]
    with torch.no_grad():
        for context, ids in zip(contexts, prompts, strict=True):
            extend(model, [context], [text_block(ids, MARKS)], store=True)
    before = [context.keys[0].clone() for context in contexts]
    found = continue_text(model, contexts, MARKS, max_length=12, end=None)
    assert found == [by_whole_passes(model, ids, 12) for ids in prompts]
    assert all(torch.equal(context.keys[0], old) for context, old in zip(contexts, before, strict=True))
    assert continue_text(model, [], MARKS) == [] and continue_text(model, [Context()], MARKS, max_length=2)


def test_nothing_is_called_for_what_is_not_there(tiny, monkeypatch):
    """Decoding leaves tower, connector, time embedder and the generation expert alone."""
    model = tiny[1]
    called = []
    for name, module in model.named_modules():
        if name in ("vit_model", "connector", "time_embedder", "vae2llm") or "moe_gen" in name:
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    try:
        continue_text(model, [Context()], MARKS, max_length=3)
    finally:
        for module in model.modules():
            module._forward_pre_hooks.clear()
    assert called == []


def test_a_time_is_embedded_once_a_step(tiny, monkeypatch):
    """Whatever the number of pictures, branches and tokens."""
    rows, model = [], tiny[1]
    real = model.time_embedder.forward
    monkeypatch.setattr(model.time_embedder, "forward", lambda t: rows.append(len(t)) or real(t))
    picture = Image.new("RGB", (32, 32))
    inferencer_of(tiny).draw_batch([["a"], [picture, "b"]], Guidance(num_timesteps=4, cfg_interval=(0, 1)), (32, 16))
    assert rows == [1] * 4  # the source of the edit, then three steps


def test_a_temperature_of_zero_takes_the_likeliest(tiny):
    inferencer = inferencer_of(tiny)
    context = inferencer.update_context_text("hi", Context())
    greedy = inferencer.gen_text(context, 8, do_sample=False)
    assert inferencer.gen_text(context, 8, do_sample=True, temperature=0.0) == greedy
    assert inferencer.gen_text(context, 8, do_sample=True, temperature=1e-40) == greedy
    for temperature in (-1, math.nan):
        with pytest.raises(UserError, match=f"temperature {temperature} is no number from 0 on"):
            inferencer.gen_text(context, 8, do_sample=True, temperature=temperature)
    sampled = [inferencer.gen_text(context, 8, temperature=5.0) for _ in range(4)]
    assert len(set(sampled)) > 1  # every call draws anew


@pytest.mark.parametrize(
    "settings",
    [{"cfg_text_scale": math.nan}, {"cfg_img_scale": math.inf}, {"timestep_shift": 0.0}, {"num_timesteps": 2.5},
     {"cfg_interval": (1.0, 0.4)}, {"cfg_interval": (0.1, 0.4, 1.0)}, {"cfg_interval": (math.nan, 1.0)},
     {"cfg_renorm_min": math.nan}, {"seed": -1}],
)  # fmt: skip
def test_settings_that_draw_nothing_are_refused_by_name(tiny, settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        inferencer_of(tiny).unified_generate("a", **{"image_shapes": (16, 16), "num_timesteps": 3, **settings})


def test_every_call_draws_anew_and_a_seed_repeats(tiny):
    def two(seed: int) -> list[bytes]:
        inferencer = inferencer_of(tiny, seed=seed)
        return [inferencer.gen_image((16, 16), Context(), num_timesteps=3).tobytes() for _ in range(2)]

    first, second = two(3)
    assert first != second and two(3) == [first, second] and two(4)[0] != first
    inferencer = inferencer_of(tiny)
    settings = dict(image_shapes=(16, 16), num_timesteps=3)
    drawn = [inferencer.unified_generate("a", **settings)["image"].tobytes() for _ in range(2)]
    again = [inferencer.unified_generate("a", seed=5, **settings)["image"].tobytes() for _ in range(2)]
    assert drawn[0] != drawn[1] and again[0] == again[1]


# --- validation -------------------------------------------------------------------------------------------------------


def test_one_pass_over_all_times_is_five_passes(open_records, tiny):
    dataset, model = open_records([APPLE, EDIT, ASK]), tiny[1]
    with torch.no_grad():
        whole = model(
            with_latents(fixed_pack(dataset, [0, 1, 2], TIMES, 3.0), load_autoencoder(model.config), model.config)
        )
        single = [
            model(with_latents(fixed_pack(dataset, [0, 1, 2], t, 3.0), load_autoencoder(model.config), model.config))
            for t in TIMES
        ]
    assert_close(whole["ce"], single[0]["ce"], atol=1e-5, rtol=1e-5)
    together = torch.cat([each["mse"] for each in single])
    assert_close(whole["mse"].mean(), together.mean(), atol=1e-6, rtol=1e-6)
    assert_close(whole["mse"].mean(-1).sort()[0], together.mean(-1).sort()[0], atol=1e-5, rtol=1e-5)


def test_a_picture_of_validation_is_encoded_once(open_records, tiny):
    dataset, encoded = open_records([APPLE, EDIT]), []
    real = load_autoencoder(tiny[1].config)

    def encode(images, noise):
        encoded.append(len(images))
        return real.encode(images, noise)

    with_latents(fixed_pack(dataset, [0, 1], TIMES, 1.0), types.SimpleNamespace(encode=encode), tiny[1].config)
    assert sum(encoded) == 3  # a drawing; the source and the target of an edit


@pytest.mark.parametrize("world", [1, 2, 3])
def test_packs_of_validation_have_one_length_and_a_budget(open_records, world):
    dataset = open_records([APPLE, EDIT, ASK] * 5)
    packs = [list(held_out_packs(dataset, 15, 700, 1.0, rank=rank, world=world)) for rank in range(world)]
    assert len({len(each) for each in packs}) == 1
    flat = [pack for each in packs for pack in each]
    assert len({pack["static_length"] for pack in flat}) == 1
    assert max(pack["sequence_length"] for pack in flat) <= flat[0]["static_length"] <= 900
    assert sum(len(pack["ce_loss_indexes"]) for pack in flat) == 5 * 7


def test_a_kind_without_records_has_no_validation_loss(open_records, tiny):
    dataset, (config, model) = open_records([APPLE]), tiny
    found = held_out_losses(
        model, dataset, lambda pack: with_latents(pack, load_autoencoder(model.config), model.config), config,
        DistInfo(), 1.0,
    )  # fmt: skip
    assert found.keys() == {"loss", "image_loss"}


def test_a_best_metric_that_cannot_be_is_replaced(pictures, tmp_path, capsys):
    (pictures / "a.jsonl").write_text(json.dumps(APPLE) + "\n")
    data = ["--train_data_path", str(pictures / "a.jsonl"), "--val_data_path", str(pictures / "a.jsonl")]
    flags = [
        *TINY,
        *data,
        "--output-dir",
        str(tmp_path / "out"),
        "--max-steps",
        "2",
        "--metric-for-best",
        "val/text_loss",
    ]
    train([*flags, "--eval-steps", "1"])
    assert "no texts to learn; val/loss decides" in capsys.readouterr().out
    assert (tmp_path / "out" / "checkpoints" / "best").exists()


# --- bounded work -----------------------------------------------------------------------------------------------------


def test_metrics_cost_what_max_records_allows(pictures, tmp_path, monkeypatch):
    """Fifty and two hundred training records: the same number of model calls."""
    calls = []
    real = Bagel.forward
    monkeypatch.setattr(Bagel, "forward", lambda self, batch: calls.append(1) or real(self, batch))
    counted = []
    for count in (50, 200):
        records = [{**ASK, "answer": f"A cat {number}."} for number in range(count // 2)]
        lines = [json.dumps(record) + "\n" for record in records + [APPLE] * (count // 2)]
        (pictures / f"{count}.jsonl").write_text("".join(lines))
        (pictures / "val.jsonl").write_text(json.dumps(ASK) + "\n" + json.dumps(APPLE) + "\n")
        data = ["--train_data_path", str(pictures / f"{count}.jsonl"), "--val_data_path", str(pictures / "val.jsonl")]
        output = str(tmp_path / str(count))
        train([*TINY, *data, "--output-dir", output, "--max-steps", "1", "--no-export"])
        calls.clear()
        metrics.main(["--checkpoint", output, "--max-records", "2", "--max-pictures", "1", "--num-timesteps", "3",
                      "--max-length", "4", "--device", "cpu"])  # fmt: skip
        counted.append(len(calls))
    assert counted[0] == counted[1] < 40


def test_prompts_are_looked_for_no_longer_than_needed(open_records, monkeypatch):
    dataset = open_records([APPLE, ASK] * 40)
    read = []
    real = type(dataset.records).__getitem__
    monkeypatch.setattr(type(dataset.records), "__getitem__", lambda self, n: read.append(n) or real(self, n))
    prompts, questions = conversations(dataset, 2)
    assert (len(prompts), len(questions)) == (2, 2) and len(set(read)) <= 4


def test_many_conversations_are_read_a_few_at_a_time(tiny, monkeypatch):
    from bagel import inferencer as module

    monkeypatch.setattr(module, "BATCH", 3)
    inferencer, sizes = inferencer_of(tiny), []
    real = inferencer.gen_texts
    monkeypatch.setattr(inferencer, "gen_texts", lambda found, *rest: sizes.append(len(found)) or real(found, *rest))
    picture = Image.new("RGB", (32, 32))
    assert len(inferencer.answer_batch([[picture, f"{n}?"] for n in range(7)], 2)) == 7 and sizes == [3, 3, 1]


# --- packs on a GPU, as far as a CPU can show -------------------------------------------------------------------------


def layout_with(generator: torch.Generator, static: int) -> PackLayout:
    sample_lens, split_lens, modes = [], [], []
    for _ in range(3):
        lengths = torch.randint(1, 90, (4,), generator=generator).tolist()
        split_lens += lengths
        modes += [(CAUSAL, FULL, NOISE)[k] for k in torch.randint(3, (4,), generator=generator).tolist()]
        sample_lens.append(sum(lengths))
    return PackLayout(sample_lens, split_lens, modes, static)


@pytest.mark.parametrize("seed", range(4))
def test_block_masks_are_those_of_the_whole_matrix(seed):
    from torch.nn.attention.flex_attention import create_block_mask

    layout, device = layout_with(torch.Generator().manual_seed(seed), 1500), torch.device("cpu")
    padded, found = layout.padded_length, flex_block_mask(layout, device)
    rule = flex_rule(*flex_ids(layout, padded, device))
    wanted = create_block_mask(rule, None, None, padded, padded, device="cpu", BLOCK_SIZE=128)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.slow
def test_packs_of_any_lengths_are_one_graph(monkeypatch):
    """Dynamo compiles flex attention once for packs, and once more at most, whatever samples they hold."""
    from torch.nn.attention.flex_attention import flex_attention

    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    kernel = torch.compile(flex_attention, dynamic=False, backend=count)
    monkeypatch.setattr(transformer, "flex_kernel", lambda is_compiled: kernel)
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(12):
        layout = layout_with(generator, 1280)
        query = torch.randn(layout.length, 4, 16, generator=generator)
        key = torch.randn(layout.length, 2, 16, generator=generator)
        rows, pairs = Rows(torch.arange(layout.length), torch.arange(0)), [(x, x[:0]) for x in (query, key, key)]
        flex, dense = (PackedAttention(layout, rows, backend)(0, *pairs)[0] for backend in ("flex", "dense"))
        assert_close(flex, dense, atol=1e-5, rtol=1e-5)
        seen.append(len(graphs))
    torch._dynamo.reset()
    assert seen[1] == seen[-1] <= 2, seen


@pytest.mark.parametrize("packing", ["tokens", "samples"])
def test_packs_of_training_have_one_static_length(open_records, tiny, packing):
    config = load_config(
        Config, presets=PRESETS, argv=[*TINY, "--packing", packing, "--batch-size", "2"], default="small"
    )
    dataset = open_records([APPLE, EDIT, ASK])
    trainer = UnifiedTrainer(config, DistInfo(), tiny[1], load_autoencoder(config.model), ByteTokenizer(), dataset)
    collate = trainer.collate()
    packs = [collate([dataset.sample(index, 0)]) for index in range(3)]
    most = config.data.max_sequence_length if packing == "samples" else config.data.tokens_per_batch
    assert {pack["static_length"] for pack in packs} == {2 * most}


# --- clips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [0, 1])
def test_every_frame_of_a_clip_advances_by_its_own_delta(loss):
    frames = [
        PlanItem("vae_image", size=(8, 8), loss=loss, frame_delta=delta, split_start=not n, split_end=n == 2)
        for n, delta in enumerate((3, 5, 2))
    ]
    items = [PlanItem("text", ids=[1]), *frames, PlanItem("text", ids=[2])]
    builder = PackBuilder(LAYOUT)
    builder.add(items, Draws([1.0] * 5, iter([0.0, 0.0])), Dropout())
    positions = builder.lists["packed_position_ids"]
    assert [positions[3 + 6 * n] for n in range(4)] == [3, 6, 11, 13]


def test_a_clean_picture_takes_one_position():
    builder = PackBuilder(LAYOUT)
    items = [PlanItem("vae_image", size=(8, 8)), PlanItem("text", ids=[2])]
    builder.add(items, Draws([1.0] * 2, iter([])), Dropout())
    assert builder.lists["packed_position_ids"][:7] == [0] * 6 + [1] and math.isinf(
        builder.lists["packed_timesteps"][0]
    )
