#!/usr/bin/env bash
# Train BAGEL: scripts/train_bagel.sh [--gpus 8] [--config small|7b|7b_lora|7b_nf4|7b_gen] [options of bagel/train.py]
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" bagel "$@"
