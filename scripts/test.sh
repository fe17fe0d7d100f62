#!/usr/bin/env bash
# Lint, shellcheck and all tests, from a fresh clone: makes the environment first. Two cores: about a quarter of an hour.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    echo "usage: scripts/test.sh [options of pytest], for example: scripts/test.sh -m 'not slow' tests/dit"
    exit 0
fi
bash scripts/setup_environment.sh
if ! .venv/bin/python -m pytest --markers "$@" >/dev/null 2>&1; then # said at once, not after the lint
    printf 'error: %s: not options of pytest; python -m pytest --help lists them\n' "$*" >&2
    exit 2
fi
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [[ -x .venv/bin/shellcheck ]]; then
    .venv/bin/shellcheck run_all.sh .ci/run scripts/*.sh
elif command -v shellcheck >/dev/null 2>&1; then
    shellcheck run_all.sh .ci/run scripts/*.sh
fi
# three workers on two cores: a dozen tests wait for timeouts, which would leave a core idle
exec .venv/bin/python -m pytest -q -n "${TEST_PROCESSES:-3}" --durations=15 "$@"
