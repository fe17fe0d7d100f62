"""Evaluate a trained model: held-out losses beside trivial baselines, captions, pictures, and a report.

    python bagel/metrics.py --checkpoint outputs/bagel --output outputs/bagel/metrics.json

Writes the figures as JSON and report.json, report.md and report.html into the output's folder. A metric that needs
weights which were not given, or that cannot be computed on these data, is null with its reason.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json

from shared.config import Section, load_config, setting
from shared.errors import UserError, command, write_text


class Options(Section):
    """Command line."""

    checkpoint: str = setting(
        "outputs/bagel", "a run's output folder, one of its checkpoints, or a folder of released form", "model_path"
    )
    base: str | None = setting(None, "folder of the base weights of a run, if they have moved")
    data: str | None = setting(None, "records to evaluate; null: the run's validation records", "val_data_path")
    train_data: str | None = setting(None, "records for baselines; null: the run's training records", "train_data_path")
    image_root: str | None = setting(None, "folder that relative picture paths start from")
    output: str | None = setting(None, "JSON file; null: metrics.json in the run's folder")
    max_records: int = setting(256, "records evaluated", ge=1)
    max_pictures: int = setting(12, "pictures drawn from held-out prompts, and as many from training prompts", ge=0)
    num_timesteps: int = setting(25, "points of the time grid of drawn pictures", ge=2)
    cfg_text_scale: float = setting(3.0, "guidance by the text")
    max_length: int = setting(64, "longest answer, tokens", ge=1)
    seed: int = setting(0, "seed of noise", ge=0, le=2**63 - 1)
    ema: bool = setting(True, "use averaged weights where there are some")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    nltk_data: str | None = setting(None, "folder with the WordNet corpus, for METEOR")
    bertscore_model: str | None = setting(None, "local folder of an encoder, for BERTScore")
    bertscore_layer: int | None = setting(None, "its layer; null: the last")
    fid_weights: str | None = setting(None, "local TorchScript file of Inception features, for FID")
    clip_model: str | None = setting(None, "local folder of a CLIP model, for the CLIP score")


@command
def main(argv: list[str] | None = None) -> None:
    """Read the options, evaluate, write the figures and the report."""
    options = load_config(Options, argv=argv, description=__doc__)
    output = Path(options.output or Path(options.checkpoint) / "metrics.json")
    if output.suffix != ".json":
        raise UserError(f"--output {output}: give a .json file")
    from bagel.evaluation.figures import evaluate, write_bagel_report
    from bagel.weights.open import open_model

    opened = open_model(options.checkpoint, model_path=options.base, prefer_ema=options.ema, device=options.device)
    output.parent.mkdir(parents=True, exist_ok=True)
    figures, samples = evaluate(opened, options, output.parent / "report_samples")
    write_text(output, json.dumps(figures, ensure_ascii=False, indent=1) + "\n")
    write_bagel_report(output.parent, figures, samples, " ".join(["python bagel/metrics.py", *(argv or sys.argv[1:])]))
    for name, value in figures.items():
        print(f"{name}: {value if not isinstance(value, float) else round(value, 4)}")
    print(f"wrote {output} and {output.parent / 'report.html'}")


if __name__ == "__main__":
    main()
