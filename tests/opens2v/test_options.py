"""Settings that no preset gives: each one is seen to act."""

import gc
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opens2v import train
from opens2v.config import SAMPLE_DATA, Config, ModelConfig
from opens2v.dataset import create_opens2v_dataloader, training_set, validation_set
from opens2v.generate import GenerateOptions
from opens2v.modules.conditions import Conditions
from opens2v.objective import RefImageFlowMatching, frame_mask
from opens2v.sampling.scheduler import FlowMatchScheduler
from opens2v.sampling.video import SamplerSettings, VideoSampler, sampler_settings, video_rate
from opens2v.weights.base import new_transformer
from shared.config import load_saved
from shared.errors import UserError
from tests.opens2v.cases import QUICK, tiny_model

CLIPS = QUICK[QUICK.index("--json-paths") :]
CHANGES_OFF = "--recolour-probability 0 --other-scene-probability 0 --generic-caption-probability 0".split()


def parse(folder, *flags) -> Config:
    return train.parse([*QUICK, *CHANGES_OFF, "--no-ref-augment", "--output-dir", str(folder), *map(str, flags)])


def part(folder, change) -> list[str]:
    """Flags for a copy of the sample's annotations, each entry's metadata changed."""
    tree = json.loads((SAMPLE_DATA / "step5/merge_final_json/dataset1.json").read_text())
    for entry in tree.values():
        change(entry["metadata"])
    (folder / "part.json").write_text(json.dumps(tree))
    return ["--json-paths", str(folder / "part.json")]


def objective_of(config: Config) -> RefImageFlowMatching:
    """The objective without encoders: for what is drawn and kept, not for losses."""
    return RefImageFlowMatching(config, SimpleNamespace(device=torch.device("cpu")))


# --- data -------------------------------------------------------------------------------------------------------------


def test_caption_key_names_the_field_that_is_read(tmp_path):
    flags = part(tmp_path, lambda metadata: metadata.update(face_cap_mine="a caption of mine"))
    plain = training_set(parse(tmp_path, *flags)).sample(0, 0)["prompts"]
    chosen = training_set(parse(tmp_path, *flags, "--caption-key", "face_cap_mine")).sample(0, 0)["prompts"]
    assert chosen == "a caption of mine" != plain


def test_max_retries_is_how_many_others_are_tried(tmp_path):
    flags = part(tmp_path, lambda metadata: metadata.update(path="nowhere.mp4"))
    config = parse(tmp_path, *flags, "--max-retries", "3", "--num-workers", "0")
    loader, _ = create_opens2v_dataloader(config)
    tried, dataset = [], loader.dataset.datasets[0]
    sample = dataset.sample
    dataset.sample = lambda index, epoch: tried.append(index) or sample(index, epoch)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="3 samples in a row.*nowhere.mp4"):
        loader.dataset[0]
    assert len(tried) == 1 + 3


def test_use_bbox_keeps_the_background_of_the_subject(tmp_path):
    cut, boxed = (training_set(parse(tmp_path, flag)).sample(0, 0) for flag in ("--no-use-bbox", "--use-bbox"))
    white = [(item["ref_pixels"][0] > 0.99).all(0).float().mean().item() for item in (cut, boxed)]
    assert white[1] < white[0] - 0.1
    assert torch.equal(cut["frames"], boxed["frames"])


# --- model ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_local_attn_size_is_the_causal_window_in_training_and_sampling():
    whole, near = (ModelConfig(causal=True, num_frame_per_block=1, local_attn_size=size) for size in (-1, 2))
    assert torch.equal(frame_mask(whole, 4), torch.ones(4, 4).tril().bool())
    assert torch.equal(frame_mask(near, 4), torch.ones(4, 4).tril().triu(-1).bool())
    model = tiny_model()
    conditions = Conditions(
        None, torch.randn(1, 20, 32), None, torch.zeros(1, 1, 16, 4, 4), torch.zeros(1, 1, dtype=torch.bool)
    )
    drawn = []
    for settings in (whole, near):
        sampler = SamplerSettings(steps=1, sampler="euler", guidance="text", guidance_scale=1.0)
        video = VideoSampler(model, model, settings, sampler)
        drawn.append(video.sample(conditions, torch.zeros(20, 32), (16, 4, 4, 4)))
    same = [torch.equal(drawn[0][:, :, frame], drawn[1][:, :, frame]) for frame in range(4)]
    assert same == [True, True, False, False]  # frames 0 and 1 see all there is


@torch.no_grad()
def test_vae_pos_embed_tells_where_a_pixel_of_the_picture_is(tmp_path):
    latents = torch.randn(1, 1, 16, 4, 4)
    for name in ("sincos2d", "none"):
        model = new_transformer(parse(tmp_path, "--vae-pos-embed", name))
        rows, turned = (
            model.project_references(None, ref_latents=given).vae_BSD for given in (latents, latents.flip(-1, -2))
        )
        assert torch.allclose(rows.flip(1), turned, atol=1e-6) == (name == "none")


# --- training ---------------------------------------------------------------------------------------------------------


def test_num_train_timestep_is_the_number_of_levels_and_leaves_their_scale(tmp_path):
    objective = objective_of(parse(tmp_path, "--num-train-timestep", "10"))
    drawn = objective.draw_timesteps(2, 0, torch.arange(400)).unique()
    table = FlowMatchScheduler(3.0, num_train_timesteps=10)
    assert len(drawn) == 10 and torch.equal(drawn.flip(0), objective.scheduler.timesteps)
    # What the network is given for a level of noise is what sampling gives it.
    assert torch.equal(drawn.flip(0), FlowMatchScheduler(3.0).inference_timesteps(10)) and drawn.max() == 1000
    last = FlowMatchScheduler(3.0, 0.1, False).inference_sigmas(4)[-1]  # 0.1 before the shift
    assert last == pytest.approx(3 * 0.1 / (1 + 2 * 0.1))
    assert table.weights.mean().item() == pytest.approx(1) and torch.equal(table.sigma_of(drawn) * 1000, drawn)


def test_gc_interval_is_the_steps_between_collections(tmp_path, monkeypatch):
    seen: list[int] = []
    for flag, expected in (("3", [0, 3, 6]), ("0", [])):
        objective = objective_of(parse(tmp_path, "--gc-interval", flag))
        for step in range(8):
            monkeypatch.setattr(gc, "collect", lambda *_, step=step: seen.append(step))
            assert not list(objective.losses(None, [], step))
        monkeypatch.undo()
        assert seen == expected
        seen.clear()


@pytest.mark.parametrize("text, expected", [("auto_resume: false", "none"), ("auto_resume: true", "auto")])
def test_auto_resume_of_a_file_decides_where_a_run_begins(tmp_path, text, expected):
    (tmp_path / "train.yaml").write_text(f"{text}\ngenerator_ckpt: wan.pt\n")
    assert train.parse(["--config_path", str(tmp_path / "train.yaml")]).run.resume == expected


def test_wandb_save_dir_and_val_num_samples_of_a_run(tmp_path, monkeypatch):
    """With a stand-in for wandb: nothing is sent anywhere."""
    begun = []

    def init(**settings):
        begun.append(settings)
        return SimpleNamespace(log=lambda row, step=None: None, finish=lambda: None)

    stand_in = SimpleNamespace(__spec__=True, init=init, util=SimpleNamespace(generate_id=lambda: "id"))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setenv("WANDB_DIR", "")  # so that what the run sets is put back
    steps = ["--base-steps", "1", "--total-steps", "1", "--warmup-steps", "0"]
    mine = ["--wandb", "--wandb-save-dir", str(tmp_path / "wandb"), "--val-num-samples", "3", "--val-steps", "1"]
    train.main([*QUICK, *CHANGES_OFF, *steps, *mine, "--output-dir", str(tmp_path / "out")])
    assert begun and all(one["dir"] == str(tmp_path / "wandb") for one in begun)
    assert len(list((tmp_path / "out" / "samples").glob("step_000001_*.mp4"))) == 3


def test_files_that_name_former_settings_are_read(tmp_path):
    flat = "codec_learning_rate: 0.001\ngenerator_ckpt: wan.pt\nopens2v: {val_background_base_paths: [b]}\n"
    (tmp_path / "flat.yaml").write_text(f"val_background_base_paths: [b]\n{flat}")
    tree = "data: {val_background_base_paths: [b]}\ntraining: {codec_learning_rate: 0.001}\n"
    (tmp_path / "config.yaml").write_text(tree)
    assert load_saved(Config, tmp_path / "flat.yaml").model.generator_ckpt == "wan.pt"
    assert load_saved(Config, tmp_path / "config.yaml") == Config()
    part = ["--val-json-paths", str(SAMPLE_DATA / "step5/merge_final_json/dataset1.json")]
    config = parse(tmp_path, *part, "--val-video-base-paths", SAMPLE_DATA / "step0/videos/dataset1")
    assert np.isfinite(validation_set(config).sample(0, 0)["ref_pixels"]).all()


def test_drawn_clips_move_as_the_training_clips_do(tmp_path):
    """24 frames a second, every third of them; and as the settings say where they say it."""
    assert video_rate(train.parse(QUICK)) == 8.0
    assert video_rate(train.parse([*QUICK, "--sample-stride", "2"])) == 12.0
    assert video_rate(train.parse([*QUICK, "--target-fps", "10"])) == 10.0
    for rate in (1e30, -5, 0, float("nan"), float("inf"), "fast", None, [24]):  # no rate that a file can state
        odd = part(tmp_path, lambda metadata, rate=rate: metadata.update(fps=rate))
        assert video_rate(train.parse([*QUICK, *odd])) == 16.0, rate
    nowhere = train.parse(QUICK)
    nowhere.data = nowhere.data.model_copy(update={"json_paths": ["nowhere.json"]})
    assert video_rate(nowhere) == 16.0


def test_samples_of_a_run_are_drawn_as_generate_draws():
    config = train.parse(["--config", "default"])
    unsaid = GenerateOptions()
    names = ("sampler", "shift", "guidance", "guidance_scale", "img_guidance_scale", "ref_scale", "seed")
    said = sampler_settings(config, steps=unsaid.steps, **{name: getattr(unsaid, name) for name in names})
    assert said == sampler_settings(config)


@pytest.mark.parametrize("name", ["recolour_probability", "other_scene_probability", "other_subject_probability"])
def test_a_change_of_the_subject_without_its_scene_is_refused_before_anything_is_made(tmp_path, name, capsys):
    bare = [*CLIPS[: CLIPS.index("--background-base-paths")], "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        train.main(["--config", "small", *bare, f"--{name}", "0.5"])
    assert f"data.{name}: " in (told := capsys.readouterr().err) and "give background_base_paths" in told
    assert not list(tmp_path.iterdir())


def test_other_subjects_come_from_drawings_that_are_given():
    with pytest.raises(UserError, match="other_subject_probability needs drawings: give scenes"):
        train.parse(["--config", "default", *CLIPS, "--generator-ckpt", "wan.pt", "--other-subject-probability", "0.5"])
    config = train.parse(["--config", "small", *CLIPS, "--other-subject-probability", "0.5"])
    assert config.data.scenes == str(SAMPLE_DATA / "drawings.json")
