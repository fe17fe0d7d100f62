#!/usr/bin/env bash
# Train FLOAT, both phases: scripts/train_rectified_flow.sh [--gpus 8] [--config small|default|large|official] [options of float/train.py]
# The guide's options: --config --output-dir --batch-size --learning-rate --num-epochs --device --resume --help
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" float "$@"
