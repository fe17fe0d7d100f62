#!/usr/bin/env bash
# Measure all systems on this machine into one table: scripts/bench.sh [--system S ...] [--parts P ...] [--rounds 5] [--output DIR] [--gpu]
# A quarter of an hour on a quiet machine. --record writes the table to scripts/BENCHMARKS.md as well.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(command -v python3)"
exec "$python" "$root/scripts/bench/bench.py" "$@"
