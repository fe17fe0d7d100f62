#!/usr/bin/env bash
# Ten minutes on one GPU: right steps, then the share of the card's peak: scripts/gpu_check.sh [--output DIR] [--minutes 10] [--device cpu --toy]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(command -v python3)"
exec "$python" "$root/scripts/bench/check.py" "$@"
