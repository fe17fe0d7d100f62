"""Runs of seconds off the main road: bf16 bases, LoRA plans, broken first clips, caches, causal validation."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opens2v import generate, metrics, precompute, train
from opens2v.config import SAMPLE_DATA
from opens2v.data.cache import CachedDataset, with_cached_features
from opens2v.dataset import training_set
from opens2v.evaluation.preview import Preview
from opens2v.plan import workload
from opens2v.weights.base import base_path
from shared.errors import UserError
from tests.launching import losses
from tests.opens2v.cases import QUICK, SCENES

STEPS = ["--base-steps", "2", "--total-steps", "2", "--warmup-steps", "0"]
DRAW = ["--steps", "1", "--device", "cpu"]
CHANGES_OFF = "--recolour-probability 0 --other-scene-probability 0 --generic-caption-probability 0".split()


def arguments(folder, *more) -> list[str]:
    return [*QUICK, *STEPS, "--output-dir", str(folder), *map(str, more)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    """The small base that the runs here start from."""
    folder = tmp_path_factory.mktemp("base") / "out"
    train.main(arguments(folder))
    return ["--generator-ckpt", str(folder / "base/generator.safetensors")]


@pytest.fixture(scope="module")
def bf16_run(base, tmp_path_factory):
    """A run as every public preset makes it: the base in bf16, LoRA, bf16 arithmetic."""
    folder = tmp_path_factory.mktemp("bf16") / "out"
    train.main(arguments(folder, *base, "--base-dtype", "bf16", "--precision", "bf16", "--r", "2", "--lora-alpha", "8"))
    return folder


# --- bf16 bases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"], ["--dtype", "fp32"]])
def test_a_run_on_a_bf16_base_draws_and_is_measured(bf16_run, tmp_path, dtype):
    generate.main(["--checkpoint", str(bf16_run), "--prompt", "a", "--output", str(tmp_path / "x.mp4"), *DRAW, *dtype])
    assert (tmp_path / "x.mp4").exists()
    few = ["--seeds", "1", "--windows", "1", "--max-clips", "2", "--output", str(tmp_path / "m.json")]
    figures = metrics.main(["--checkpoint", str(bf16_run), *DRAW, *few, *dtype])
    assert all(np.isfinite(value) for value in figures.values())


def test_benchmark_videos_on_a_bf16_base(bf16_run, tmp_path):
    shutil.copy(next((SAMPLE_DATA / "subject_crops/dataset1").glob("*.png")), tmp_path / "a.png")
    (tmp_path / "eval.json").write_text(json.dumps({"one": {"prompt": "a", "img_paths": ["a.png"]}}))
    where = ["--eval-json", str(tmp_path / "eval.json"), "--output-dir", str(tmp_path / "v")]
    metrics.main(["--checkpoint", str(bf16_run), *DRAW, *where])
    assert (tmp_path / "v/one.mp4").exists()


def test_a_bf16_base_trains_in_fp32(base, tmp_path):
    train.main(arguments(tmp_path / "out", *base, "--base-dtype", "bf16", "--precision", "fp32", "--r", "2"))
    assert losses(tmp_path / "out").keys() == {1, 2}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_plans_with_lora(precision):
    config = train.parse([*QUICK, "--r", "4", "--base-dtype", "bf16", "--precision", precision])
    plan = workload(config).plan(config)
    own = train.parse([*QUICK, "--base-dtype", "bf16", "--precision", precision])
    assert plan.measured.trainable - workload(own).plan(own).measured.trainable == 8 * 4 * (32 + 32)


# --- clips that cannot be read ----------------------------------------------------------------------------------------


def many_clips(tmp_path, bad: int, count: int = 200) -> list[str]:
    """A part of `count` entries of which number `bad` names a video that is not there."""
    source = json.loads((SAMPLE_DATA / "step5/merge_final_json/dataset1.json").read_text())
    entries = {}
    for place in range(count):
        key, entry = list(source.items())[place % len(source)]
        entries[f"{place:03d}_{key}"] = json.loads(json.dumps(entry))
    entries[list(entries)[bad]]["metadata"]["path"] = "gone.mp4"
    path = tmp_path / "dataset1.json"
    path.write_text(json.dumps(entries))
    return ["--json-paths", str(path), "--without-keys", "none"]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_broken_clip_among_the_first_does_not_end_the_run(base, tmp_path, bad):
    folder, clips = tmp_path / "out", many_clips(tmp_path, bad)
    train.main(arguments(folder, *base, *CHANGES_OFF, *clips))
    assert (folder / "DONE").exists() and list((folder / "checkpoints").glob("checkpoint_*"))
    assert list((folder / "samples").glob("*.mp4"))
    generate.main(["--checkpoint", str(folder), "--output", str(tmp_path / "x.mp4"), *DRAW])
    few = ["--seeds", "1", "--windows", "1", "--max-clips", "2", "--output", str(tmp_path / "m.json")]
    metrics.main(["--checkpoint", str(folder), *DRAW, *few])


def test_a_base_is_trained_although_the_codec_meets_a_broken_clip(tmp_path):
    train.main(arguments(tmp_path / "out", *CHANGES_OFF, *many_clips(tmp_path, 0), "--max-steps", "1"))
    assert (tmp_path / "out/base/generator.safetensors").exists()


def test_with_strict_a_broken_validation_clip_stops_before_the_first_step(base, tmp_path):
    with pytest.raises(UserError, match=r"gone.mp4.*\(strict\)"):
        train.main.__wrapped__(arguments(tmp_path / "out", *base, *CHANGES_OFF, *many_clips(tmp_path, 0), "--strict"))
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_time_limit_in_the_bases_phase_ends_in_peace(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        train.main(arguments(tmp_path / "out", "--time-limit-minutes", "1e-9"))
    assert left.value.code == 0 and "the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "out/base/generator.safetensors").exists()


def test_a_run_killed_between_the_base_and_its_copy_goes_on(tmp_path):
    folder = tmp_path / "out"
    train.main(arguments(folder, "--max-steps", "2"))
    wanted = load_file(folder / "base/generator.safetensors")
    for left in (folder / "base/generator.safetensors", folder / "DONE", folder / "metrics.jsonl"):
        left.unlink()
    shutil.rmtree(folder / "checkpoints")
    train.main(arguments(folder, "--max-steps", "2"))
    again = load_file(folder / "base/generator.safetensors")
    assert all(torch.equal(again[name], value) for name, value in wanted.items())


# --- caches -----------------------------------------------------------------------------------------------------------


def cached(tmp_path, base, *more) -> list[str]:
    return arguments(tmp_path / "out", *base, "--cache-dir", tmp_path / "cache", *more)


@pytest.mark.parametrize(
    "options",
    [
        [*CHANGES_OFF, "--subject-selection", "random"],
        ["--recolour-probability", "0.7", "--other-scene-probability", "0.5", "--generic-caption-probability", "0.5"],
    ],
)
def test_every_feature_of_a_cached_sample_is_of_one_draw(base, tmp_path, options):
    command = cached(tmp_path, base, *options)
    precompute.main([*command, "--what", "text,clip,vae", "--cache-variants", "2"])
    use = ["--use-cached-text", "--use-cached-latents", "--use-cached-clip"]
    config = train.parse([*command, *use])
    plain = train.parse(command)
    encoders = train.OpenS2VTrainer(plain).encoders
    dataset = with_cached_features(training_set(config, load_frames=False, with_content=True), config)
    assert isinstance(dataset, CachedDataset)
    for epoch in range(4):
        item, own = dataset.sample(0, epoch), training_set(plain).sample(0, epoch % 2)
        assert torch.equal(item["ref_pixels"], own["ref_pixels"]) and item["prompts"] == own["prompts"]
        batch = {name: value[None] for name, value in own.items() if isinstance(value, torch.Tensor)}
        batch["prompts"] = [own["prompts"]]
        wanted = encoders.conditions(batch)
        for name, value in (("clip_tokens", wanted.clip_BNSC), ("latents", wanted.latents_BCFhw)):
            assert torch.allclose(item[name], value[0], atol=2e-2, rtol=1e-2), name
        assert torch.allclose(item["text_rows"], wanted.text_BRD[0], atol=2e-2, rtol=1e-2)
    train.main([*command, *use])
    assert list((tmp_path / "out/samples").glob("*.mp4")), "videos are drawn from stored prompts"


@pytest.mark.parametrize("edit", ["caption", "mask", "video"])
def test_features_of_what_was_edited_are_refused_and_made_again(base, tmp_path, edit):
    data = tmp_path / "data"
    shutil.copytree(SAMPLE_DATA, data)
    part = data / "step5/merge_final_json/dataset1.json"
    paths = ["--json-paths", part, "--video-base-paths", data / "step0/videos/dataset1"]
    paths += ["--background-base-paths", data / "step5/final_output/dataset1/foreground", "--without-keys", "none"]
    command = cached(tmp_path, base, *CHANGES_OFF, *paths)
    assert precompute.main([*command, "--what", "text,clip,vae"])["stored"] == 10
    entries = json.loads(part.read_text())
    key, entry = next(iter(entries.items()))
    if edit == "caption":
        entry["metadata"]["face_cap_qwen"] += " It is night."
    elif edit == "mask":
        frame = str(entry["annotation"]["ann_frame_data"]["ann_frame_idx"])
        entry["annotation"]["mask_annotation"][frame]["1"]["score"] = [0.1]
    else:
        others = [other["metadata"]["path"] for other in entries.values()]
        shutil.copy(data / "step0/videos/dataset1" / others[1], data / "step0/videos/dataset1" / others[0])
    part.write_text(json.dumps(entries))
    use = ["--use-cached-text", "--use-cached-latents", "--use-cached-clip"]
    with pytest.raises(UserError, match="made from another (caption|annotation or video)"):
        train.main.__wrapped__([*command, *use, "--total-steps", "8"])
    assert precompute.main([*command, "--what", "text,clip,vae"]) == {"stored": 1, "present": 9, "bad": 0}
    train.main([*command, *use])


def test_val_prompts_and_pictures_are_drawn_from_the_cache(base, tmp_path):
    picture = next((SAMPLE_DATA / "subject_crops/dataset1").glob("*.png"))
    shown = ["--val-prompts", "a red robot", "--val-ref-images", picture]
    command = cached(tmp_path, base, *CHANGES_OFF, *shown)
    precompute.main([*command, "--what", "text,clip"])
    train.main([*command, "--use-cached-text", "--use-cached-clip"])
    assert json.loads((tmp_path / "out/samples/step_000002.json").read_text()) == {"step_000002_0": "a red robot"}
    other = cached(tmp_path, base, *CHANGES_OFF, "--val-prompts", "a blue robot", "--use-cached-text")
    with pytest.raises(UserError, match="a blue robot.*run opens2v/precompute.py"):
        train.main.__wrapped__(other)


# --- causal runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forcing", [[], ["--teacher-forcing"]])
def test_a_causal_run_is_validated_as_it_is_trained(base, tmp_path, forcing, monkeypatch):
    causal = ["--causal", "--num-training-frames", "9", "--num-frame-per-block", "1", *forcing]
    trainer = train.OpenS2VTrainer(train.parse(arguments(tmp_path / "out", *base, *causal)))
    seen: list[set[str]] = []
    forward = type(trainer.model).forward

    def spied(self, *given, **named):
        seen.append({name for name in ("frame_mask", "clean_hidden_states") if named.get(name) is not None})
        return forward(self, *given, **named)

    monkeypatch.setattr(type(trainer.model), "forward", spied)
    with torch.no_grad():
        found = trainer.preview.validate(trainer.model, 0)
    wanted = {"frame_mask", "clean_hidden_states"} if forcing else {"frame_mask"}
    assert seen and all(one == wanted for one in seen) and np.isfinite(found["loss"])


def test_validation_takes_no_more_clips_at_a_time_than_training(base, tmp_path, monkeypatch):
    trainer = train.OpenS2VTrainer(train.parse(arguments(tmp_path / "out", *base, "--batch-size", "1")))
    sizes = []
    forward = type(trainer.model).forward
    monkeypatch.setattr(
        type(trainer.model), "forward", lambda self, x, *a, **k: sizes.append(len(x)) or forward(self, x, *a, **k)
    )
    with torch.no_grad():
        trainer.preview.validate(trainer.model, 0)
    assert set(sizes) == {1}


# --- names and places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../out.mp4", "/tmp/out.mp4", "a/../../out.mp4", ""])
def test_a_list_cannot_write_outside_of_its_folder(bf16_run, tmp_path, name):
    (tmp_path / "list.jsonl").write_text(json.dumps({"prompt": "x", "output": name}))
    with pytest.raises(UserError, match="lies outside"):
        listed = ["--prompt-file", str(tmp_path / "list.jsonl"), "--output-dir", str(tmp_path)]
        generate.main.__wrapped__(["--checkpoint", str(bf16_run), *listed])


WRONG_REQUESTS = [
    ({"prompt": 3}, "must be a text"),
    ({"prompt": None}, "must be a text"),
    ({"prompt": "x", "ref_image": 5}, "a file name or a list"),
    ({"prompt": "x", "ref_image": {"a": 1}}, "a file name or a list"),
    ({"prompt": "x", "ref_image": [None]}, "a file name or a list"),
    ({"prompt": "x", "ref_image": ["nowhere.png"]}, "nowhere.png: not found"),
    ({"prompt": "x", "ref_image": "."}, "not found"),
    ({"prompt": "x", "output": 7}, "a file name is needed"),
]


@pytest.mark.parametrize("record, message", WRONG_REQUESTS)
def test_a_wrong_request_is_refused_before_anything_is_loaded(tmp_path, record, message):
    """In a list of prompts and in a benchmark's file, by which time no run has been looked for."""
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps({"prompt": "y"}) + "\n" + json.dumps(record))
    with pytest.raises(UserError, match=f"line 2.*{message}"):
        generate.main.__wrapped__(["--checkpoint", "none", "--prompt-file", str(path), "--output-dir", str(tmp_path)])
    if "output" not in record:
        entry = {"prompt": record["prompt"], "img_paths": record.get("ref_image")}
        path.write_text(json.dumps({"one": entry}), encoding="utf-8-sig")
        with pytest.raises(UserError, match=f"one.*{message}"):
            metrics.main.__wrapped__(["--checkpoint", "none", "--eval-json", str(path), "--output-dir", str(tmp_path)])


def test_two_videos_of_a_list_do_not_overwrite_each_other(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"prompt": "x", "output": "a.mp4"}\n{"prompt": "y", "output": "b/../a.mp4"}')
    with pytest.raises(UserError, match="line 2: output a.mp4 was named before"):
        where = ["--prompt-file", str(tmp_path / "list.jsonl"), "--output-dir", str(tmp_path)]
        generate.main.__wrapped__(["--checkpoint", "none", *where])


def test_latent_frames_are_read_as_so_many_pixel_frames(base, tmp_path):
    config = train.parse(arguments(tmp_path, "--num-training-frames", "3", "--num-training-frames-unit", "latent"))
    assert training_set(config).sample(0, 0)["frames"].shape[1] == 9


def test_validation_clips_of_their_own(base, tmp_path):
    source = json.loads((SAMPLE_DATA / "step5/merge_final_json/dataset1.json").read_text())
    own = {key: entry for key, entry in source.items() if "girl" in key}
    (tmp_path / "val.json").write_text(json.dumps(own))
    where = ["--val-json-paths", tmp_path / "val.json", "--val-video-base-paths", SAMPLE_DATA / "step0/videos/dataset1"]
    config = train.parse(arguments(tmp_path, *where, "--without-keys", "elephant"))
    assert len(Preview(config, None, None, None).dataset) == 1
    assert base_path(config).name == "generator.safetensors"


def test_composed_scenes_train_draw_resume_and_are_measured(tmp_path):
    folder = tmp_path / "out"
    command = [*SCENES, "--base-steps", "1", "--total-steps", "2", "--output-dir", str(folder)]
    train.main([*command, "--max-steps", "1"])
    train.main(command)
    assert losses(folder).keys() == {1, 2} and list((folder / "samples").glob("*.mp4"))
    generate.main(["--checkpoint", str(folder), "--output", str(tmp_path / "x.mp4"), *DRAW])
    figures = metrics.main(["--checkpoint", str(folder), *DRAW, "--seeds", "1", "--max-clips", "3"])
    assert {"combinations_ground_percent", "subjects_own_of_eight_percent"} <= figures.keys()
    assert (folder / "samples/metrics/combinations.png").exists() and (folder / "report.html").exists()
    with pytest.raises(UserError, match="not cached"):
        train.main.__wrapped__([*command, "--cache-dir", str(tmp_path), "--use-cached-text"])


def test_what_a_run_needs_after_its_small_base_is_opened_before_it(tmp_path, capsys):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip_vision_model"}')
    (tmp_path / "words.pt").write_text("no weights")
    for flags, words in (
        (["--image-encoder", "clip"], "image_encoder_path None: not a folder"),
        (["--image-encoder", "clip", "--image-encoder-path", tmp_path / "clip"], "clip: cannot be loaded"),
        (["--init-from", tmp_path / "words.pt"], "words.pt"),
        (["--target-modules", "nothing"], "target_modules: nothing not known"),
        (["--num-frames", "1000001"], "less than or equal to 10001"),
    ):
        with pytest.raises(SystemExit) as left:
            train.main(arguments(tmp_path / "out", *flags))
        assert left.value.code == 2 and words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
