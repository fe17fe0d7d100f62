"""Score a run on held-out clips.

  python float/metrics.py --checkpoint outputs/float --output outputs/float/metrics.json
  python float/metrics.py --checkpoint outputs/float --data-root ../talking_head --split val
  python float/metrics.py --features-real real.npy --features-made made.npy    Frechet distance (FID, FVD, ...)
  python float/metrics.py --video-embeddings v.npy --audio-embeddings a.npy    LSE-D, LSE-C of SyncNet-like embeddings
  python float/metrics.py --frame-embeddings f.npy --source-embedding s.npy    CSIM
Rendered clips carry the true mouth opening: a small meter, trained on true frames, reads it off generated frames.
For other clips it learns from true frames how loud the person is; with too few clips the mouth's activity stands in.
Writes the numbers, and report.json, report.md, report.html with videos beside the checkpoint.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from shared.config import Section, load_config, setting
from shared.errors import UserError, check_output, command, write_text

if TYPE_CHECKING:
    import numpy as np

    from float.config import DataConfig
    from float.evaluation.mouth_meter import MouthMeter
    from float.evaluation.scoring import Material, Scorer
    from shared.report.page import Sample

METER_CLIPS = 4  # that suffice to train the mouth meter
BY_TRUTH, BY_LOUDNESS = "meter trained on true openings", "meter trained on how loud true frames are"
BY_ACTIVITY = "mouth activity, too few clips for a meter"
TARGET_GAIN, TARGET_RECONSTRUCTION, TARGET_MOUTH, TARGET_MARGIN = 3.0, 0.75, 0.65, 0.5


class MetricsOptions(Section):
    """What to score."""

    checkpoint: str | None = setting(None, "run of float/train.py or one of its checkpoints")
    output: str | None = setting(None, "JSON file for the numbers; null: metrics.json in the run")
    data_root: str | None = setting(None, "clips to score; null: those of the run")
    split: str | None = setting(None, "split to score; null: the run's validation split")
    seeds: list[int] = setting([15, 16], "seeds of the sampler's noise; scores are means over them")
    max_sounds: int = setting(4, "other clips' sounds given to each portrait as a contrast", ge=1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    features_real: str | None = setting(None, ".npy of features (n, F) of true frames or clips")
    features_made: str | None = setting(None, ".npy of features of generated ones")
    video_embeddings: str | None = setting(None, ".npy of embeddings (n, F) of mouth pictures")
    audio_embeddings: str | None = setting(None, ".npy of embeddings (n, F) of the sound")
    frame_embeddings: str | None = setting(None, ".npy of identity embeddings (n, F) of generated frames")
    source_embedding: str | None = setting(None, ".npy of the source's identity embedding (F,)")


def feature_scores(options: MetricsOptions) -> dict[str, float]:
    """The distances of given feature files."""
    from float.evaluation.formulas import cosine_similarity, frechet_distance, lip_sync_error

    scores: dict[str, float] = {}
    try:
        if options.features_real:
            scores["frechet_distance"] = frechet_distance(*_load_pair(options, "features_real", "features_made"))
        if options.video_embeddings:
            distance, confidence, offset = lip_sync_error(*_load_pair(options, "video_embeddings", "audio_embeddings"))
            scores |= {"lse_d": distance, "lse_c": confidence, "lse_offset_frames": offset}
        if options.frame_embeddings:
            scores["csim"] = cosine_similarity(*_load_pair(options, "frame_embeddings", "source_embedding"))
    except ValueError as error:
        raise UserError(f"feature files: {error}") from None
    return scores


def _load_pair(options: MetricsOptions, first: str, second: str) -> list:
    import numpy as np

    arrays = []
    flags = ["--" + name.replace("_", "-") for name in (first, second)]
    for name, flag in zip((first, second), flags, strict=True):
        path = options[name]
        if path is None or not Path(path).is_file():
            raise UserError(f"{flag} {path}: no such file; give both {flags[0]} and {flags[1]}")
        try:
            arrays.append(np.load(path, allow_pickle=False))
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{flag} {path}: not a readable .npy file ({error})") from None
    return arrays


def run_scores(options: MetricsOptions, checkpoint: str) -> dict:
    """Everything that a trained run can be scored on, with report and videos in the run's folder."""
    from float.config import data_root
    from float.data.clips import find_clips
    from float.evaluation.scoring import Scorer, load_material
    from float.sampling.animate import load_run, run_folder
    from shared.engine.dist import init_distributed

    animator = load_run(checkpoint, init_distributed(options.device).device)
    folder, data = run_folder(Path(checkpoint)), animator.config.data
    data.data_root = options.data_root or data.data_root
    root, split = data_root(data), options.split or data.val_split
    held_out = load_material(animator, find_clips(root, split), root)
    train = load_material(animator, find_clips(root, data.train_split, required=False), root)
    meter, rule = meter_of(held_out, train, data, folder / "mouth_meter.safetensors", str(root.resolve()))
    scorer = Scorer(animator, meter)
    reconstruction, rebuilt = scorer.score_reconstruction(held_out)
    contrast = (held_out + train)[: options.max_sounds + 1]
    generation, made = scorer.score_generation(held_out, contrast, options.seeds)
    values = {
        **reconstruction.values,
        **generation.values,
        "held_out_clips": len(held_out),
        "uses_meter": rule == BY_TRUTH,
    }
    known = {item.clip.identity for item in train}
    made_by_clip = list(zip(held_out, rebuilt, made, strict=True))
    samples = [
        sample
        for item, one, other in made_by_clip
        for sample in _shown(folder, scorer, item, one, other, known=item.clip.identity in known)
    ]
    _report(folder, options, values, samples, rule)
    return {**values, "clips": [{**a, **b} for a, b in zip(reconstruction.clips, generation.clips, strict=True)]}


def meter_of(
    held_out: "list[Material]", train: "list[Material]", data: "DataConfig", cache: Path, name: str
) -> "tuple[MouthMeter | None, str]":
    """What reads mouths off frames, and its rule; it learns from other people than it judges where there are enough."""
    from float.evaluation.mouth_meter import loudness, meter_for

    rule = BY_TRUTH if all(item.truth is not None for item in held_out) else BY_LOUDNESS
    known = [item for item in train if rule == BY_LOUDNESS or item.truth is not None]
    judged = {item.clip.identity for item in held_out}
    others = [item for item in known if item.clip.identity not in judged]
    known = others if len(others) >= METER_CLIPS else known
    if not known or rule == BY_LOUDNESS and len(known) < METER_CLIPS:
        return None, BY_ACTIVITY
    frames, truths = [item.frames for item in known], [item.truth for item in known if item.truth is not None]
    if rule == BY_LOUDNESS:
        truths = [loudness(item.wave, fps=data.video_fps, frames=len(item.frames)) for item in known]
    key = f"{rule} {name} {[(item.clip.clip_id, len(item.frames)) for item in known]} {data.mouth_box}"
    return meter_for(frames, truths, data.mouth_box, cache, key), rule


def _shown(
    folder: Path, scorer: "Scorer", item: "Material", rebuilt: "np.ndarray", made: "np.ndarray", *, known: bool
) -> "list[Sample]":
    """For the page: the talking face with its mouth's curve over the sound's, the video, and the three side by side."""
    from float.data.media import write_video
    from float.evaluation.scoring import side_by_side, talking_sheet
    from shared.report.page import Sample

    fps, clip = scorer.config.data.video_fps, item.clip.clip_id
    who = "a person of the training clips" if known else "a person that no training clip shows"
    enlarge = max(1, 384 // made.shape[1])
    sheet, alone, compared = (
        folder / "samples" / name for name in (f"talking_{clip}.png", f"talking_{clip}.mp4", f"compare_{clip}.mp4")
    )
    talking_sheet(sheet, made, scorer.opening(made), scorer.reference(item), item.wave, fps=fps)
    write_video(alone, side_by_side(made, enlarge=enlarge), fps=fps, wave=item.wave)
    three = side_by_side(item.frames, rebuilt, made, enlarge=max(1, enlarge // 2))
    write_video(compared, three, fps=fps, wave=item.wave)
    return [
        Sample(sheet, f"{clip}, {who}: one portrait and the sound; above frames, below the mouth", "talking"),
        Sample(alone, f"{clip}, {who}: generated from the first frame and the sound", "talking"),
        Sample(compared, f"{clip}: true, rebuilt from its true motion, generated from the sound", "side by side"),
    ]


def _report(folder: Path, options: MetricsOptions, values: dict, samples: "list[Sample]", rule: str) -> None:
    from shared.report.page import Bar, write_report

    copy, copy_mouth, other = values["psnr_copy"], values["psnr_mouth_copy"], values["mouth_r_other_sound"]
    by_copy, by_other = "baseline: copy of the first frame", "baseline: another clip's sound"
    rebuilt_r, generated_r = values["mouth_r_reconstruction"], values["mouth_r_own_sound"]
    bars = [
        Bar("PSNR of reconstruction, dB", values["psnr"], copy + TARGET_GAIN, baseline=copy, note=by_copy),
        Bar("PSNR of the mouth, dB", values["psnr_mouth"], copy_mouth + TARGET_GAIN, baseline=copy_mouth),
        Bar("mouth on reconstructions, r", rebuilt_r, TARGET_RECONSTRUCTION, note=rule),
        Bar("mouth on generated frames, r", generated_r, TARGET_MOUTH, baseline=other, note=by_other),
        Bar("own sound minus other sounds, r", values["mouth_r_margin"], TARGET_MARGIN),
        Bar("largest lag, frames", values["worst_lag_frames"], 1.0, direction="at most"),
    ]
    write_report(
        folder,
        title="FLOAT: talking portraits",
        command=f"python float/metrics.py --checkpoint {options.checkpoint}",
        summary={name: value for name, value in values.items() if isinstance(value, float)},
        bars=bars,
        samples=samples,
        headline=f"the drawn mouth follows its sound with r {generated_r:.2f}; with another clip's sound {other:.2f}",
    )


@command
def main(argv: list[str] | None = None) -> dict:
    """Read the flags, score, write and print."""
    options = load_config(MetricsOptions, argv=argv, description=__doc__)
    if not options.seeds:
        raise UserError("--seeds is empty; give one seed or more")
    if options.output is not None:
        check_output(options.output)
    scores: dict = feature_scores(options)
    if options.checkpoint is not None:
        if not Path(options.checkpoint).exists():
            raise UserError(f"--checkpoint {options.checkpoint}: no such file or folder")
        scores |= run_scores(options, options.checkpoint)
    if not scores:
        raise UserError("nothing to score: give --checkpoint, or feature files (see --help)")
    output = Path(options.output) if options.output else None
    if output is None and options.checkpoint is not None:
        from float.sampling.animate import run_folder

        output = run_folder(Path(options.checkpoint)) / "metrics.json"
    if output is not None:
        write_text(output, json.dumps(scores, indent=1))
    for name, value in scores.items():
        if isinstance(value, (int, float)):
            print(f"{name:28s} {value:.4f}")
    return scores


if __name__ == "__main__":
    main()
