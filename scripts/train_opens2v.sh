#!/usr/bin/env bash
# OpenS2V reference modules on a frozen Wan2.1-T2V-1.3B: the preset for 24 GB cards; more flags follow, the last one counts.
#   scripts/train_opens2v.sh --config small                       two CPU cores, shipped data
#   GPUS=8 scripts/train_opens2v.sh --config 80gb --generator-ckpt WAN --base-model-path WAN --image-encoder-path CLIP ...
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "$root/scripts/launch.sh" opens2v --config default "$@"
