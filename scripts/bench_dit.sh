#!/usr/bin/env bash
# Time DiT's training steps against diffusers: scripts/bench_dit.sh [--rounds 10] [options of dit/benchmark.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(command -v python3)"
exec "$python" "$root/dit/benchmark.py" --parts peers "$@"
