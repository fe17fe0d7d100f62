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

from bagel.config import MetricsOptions
from shared.config import load_config
from shared.errors import check_output, command, write_text


@command
def main(argv: list[str] | None = None) -> None:
    """Read the options, evaluate, write the figures and the report."""
    options = load_config(MetricsOptions, argv=argv, description=__doc__)
    output = check_output(options.output or Path(options.checkpoint) / "metrics.json", (".json",))
    from bagel.evaluation.figures import evaluate, write_bagel_report
    from bagel.evaluation.pictures import open_judges
    from bagel.weights.open import open_model

    judges = open_judges(options)
    opened = open_model(options.checkpoint, model_path=options.base, prefer_ema=options.ema, device=options.device)
    figures, samples = evaluate(opened, options, judges, output.parent / "report_samples")
    write_text(output, json.dumps(figures, ensure_ascii=False, indent=1) + "\n")
    write_bagel_report(output.parent, figures, samples, " ".join(["python bagel/metrics.py", *(argv or sys.argv[1:])]))
    for name, value in figures.items():
        print(f"{name}: {value if not isinstance(value, float) else round(value, 4)}")
    print(f"wrote {output} and {output.parent / 'report.html'}")


if __name__ == "__main__":
    main()
