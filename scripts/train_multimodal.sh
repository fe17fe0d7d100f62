#!/usr/bin/env bash
# Train the image, text and audio model: scripts/train_multimodal.sh [--gpus 8] [--config small|default|large] [options of multimodal/train.py]
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" multimodal "$@"
