#!/usr/bin/env bash
# Train the text-to-image DiT: scripts/train_dit.sh [--gpus 8] [--config small|default|large|xl] [options of dit/train.py]
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" dit "$@"
