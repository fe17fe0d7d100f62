#!/usr/bin/env bash
#SBATCH --job-name=training
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@330
#SBATCH --requeue
# A template for sbatch: one launcher a node; 330 seconds before the end every rank saves, for which launch.sh leaves it 270, and
# the job goes back into the queue.
# usage: sbatch scripts/slurm.sh SYSTEM [options of train.py]      for example: sbatch scripts/slurm.sh dit --config xl --strategy fsdp
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help || $# -eq 0 ]]; then
    echo "usage: sbatch scripts/slurm.sh SYSTEM [options of train.py]"
    exit 0
fi
[[ -n "${SLURM_JOB_ID:-}" ]] || { echo "error: start it with sbatch (SLURM_JOB_ID is not set)" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:?}"
master="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):${MASTER_PORT:-29500}"

stop_and_requeue() {
    echo "time is nearly over: saving, then back into the queue"
    scancel --signal=TERM "$SLURM_JOB_ID.0" || true
    wait "$step" || true
    [[ -f "${REQUEUE_UNLESS:-/nonexistent}" ]] || scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap stop_and_requeue USR1

# each node expands its own number
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    master="$1"; shift
    exec bash scripts/launch.sh --nodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --master "$master" --max-restarts 3 "$@"
' launch "$master" "$@" &
step=$!
wait "$step"
