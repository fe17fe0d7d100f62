"""Train the image, text and audio model in three stages.

On a laptop, with the data that ship here:   python multimodal/train.py --config small --output-dir outputs/multimodal
The guide's run:      python multimodal/train.py --data-root ./data --output-dir ./outputs --model-size base
--batch-size 8 --epochs 100 --lr 1e-4 Eight GPUs:           scripts/train_multimodal.sh --gpus 8 --config large
--data-root ./data The same command again resumes. --dry-run prints parameters, FLOPs, memory and time and stops.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from multimodal.config import PRESETS, Config, stage_epochs  # noqa: E402
from shared.config import load_config  # noqa: E402
from shared.errors import UserError, command  # noqa: E402


def run_stages(config: Config) -> dict:
    """Open the data, train every stage that is not done, and return what the report needs."""
    from multimodal.run import Run

    return Run(config).train()


@command
def main(argv: list[str] | None = None) -> None:
    """Read the settings, then plan or train."""
    config = load_config(Config, presets=PRESETS, argv=argv, default="default", description=__doc__)
    if not config.training.use_amp:
        config.run.precision = "fp32"
    try:
        stage_epochs(config.training)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.run.dry_run:
        from multimodal.plan import print_plan

        print_plan(config)
        return
    run_stages(config)


if __name__ == "__main__":
    main()
