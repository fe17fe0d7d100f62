#!/usr/bin/env bash
# Time one DiT-S/2 training step against diffusers' DiT of the same size: scripts/bench_dit.sh [--rounds 10] [options of dit/benchmark.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(command -v python3)"
exec "$python" "$root/dit/benchmark.py" "$@"
