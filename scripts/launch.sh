#!/usr/bin/env bash
# Start one system's training on one or many GPUs and nodes. The only launcher: the other train_*.sh call it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<'TEXT'
usage: scripts/launch.sh [launcher options] SYSTEM [launcher options] [options of SYSTEM/train.py]

SYSTEM is one of: float opens2v bagel dit multimodal

launcher options (also from the variables in brackets)
  --gpus N          processes on this node [GPUS]; default: the GPUs found, or one process on the CPU
  --nodes N         nodes of the run [NNODES], default 1
  --node-rank K     which of them this is, 0 to N-1 [NODE_RANK]
  --master H:PORT   address of node 0 [MASTER], needed for several nodes
  --max-restarts N  restart the processes after a failure this many times, default 0
  --entry FILE      another script of the system than train.py, such as precompute.py
  --print-command   print the command and stop; so does --dry-run in front of SYSTEM
  --help            this text

Everything else goes to train.py, for example --config default --strategy fsdp --dry-run (the plan) --output-dir outputs/run.
examples:
  scripts/launch.sh --gpus 8 dit --config default --strategy fsdp
  scripts/launch.sh --nodes 2 --node-rank 0 --master host0:29500 bagel --config 7b --strategy zero3
TEXT
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

whole_number() { # NAME VALUE LEAST MOST
    [[ "$2" =~ ^[0-9]{1,9}$ ]] || fail "$1 $2: a whole number is needed"
    ((10#$2 >= $3)) || fail "$1 $2: at least $3"
    ((10#$2 <= $4)) || fail "$1 $2: from $3 to $4"
}

system="" gpus="${GPUS:-}" nodes="${NNODES:-1}" node_rank="${NODE_RANK:-}" master="${MASTER:-}"
restarts=0 entry=train.py print_only=false plan=false
forwarded=()
while (($#)); do
    case "$1" in
    --gpus | --nodes | --node-rank | --master | --max-restarts | --entry)
        [[ -n "${2:-}" && "$2" != --* ]] || fail "$1 needs a value"
        case "$1" in
        --gpus) gpus="$2" ;;
        --nodes) nodes="$2" ;;
        --node-rank) node_rank="$2" ;;
        --master) master="$2" ;;
        --max-restarts) restarts="$2" ;;
        --entry) entry="$2" ;;
        esac
        shift 2
        ;;
    --print-command)
        print_only=true
        shift
        ;;
    --dry-run | --dry_run)
        if [[ -z "$system" ]]; then print_only=true; else
            plan=true
            forwarded+=("$1")
        fi
        shift
        ;;
    -h | --help)
        if [[ -z "$system" ]]; then
            usage
            exit 0
        fi
        plan=true # one process is enough to print the system's own help
        forwarded+=("$1")
        shift
        ;;
    float | opens2v | bagel | dit | multimodal)
        if [[ -z "$system" ]]; then system="$1"; else forwarded+=("$1"); fi
        shift
        ;;
    *)
        [[ -n "$system" ]] || fail "$1: expected a launcher option or one of float, opens2v, bagel, dit, multimodal (see --help)"
        forwarded+=("$1")
        shift
        ;;
    esac
done

[[ -n "$system" ]] || fail "no system given; one of float, opens2v, bagel, dit, multimodal (see --help)"
[[ "$entry" =~ ^([a-z][a-z_0-9]*/)*[a-z][a-z_0-9]*\.py$ ]] || fail "--entry $entry: the name of a .py file of the system, such as precompute.py"
[[ -f "$root/$system/$entry" ]] || fail "--entry $entry: $system/$entry does not exist"
whole_number --nodes "$nodes" 1 100000
whole_number --max-restarts "$restarts" 0 1000
[[ -z "$node_rank" ]] || whole_number --node-rank "$node_rank" 0 $((10#$nodes - 1))
if [[ -n "$master" ]]; then
    [[ "$master" =~ ^[^:[:space:]]+:[0-9]{1,5}$ || "$master" =~ ^\[[0-9a-fA-F:]+\]:[0-9]{1,5}$ ]] || fail "--master $master: HOST:PORT is needed, such as host0:29500"
    whole_number "the port of --master" "${master##*:}" 1 65535
fi

python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(command -v python3 || command -v python)" || fail "no python found; run scripts/setup_environment.sh"

found=0
if command -v nvidia-smi >/dev/null 2>&1; then
    found="$( (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU' || true)"
fi
if [[ -z "$gpus" ]]; then
    gpus="$found"
    if ((gpus == 0)); then
        echo "no GPU found: one process on the CPU" >&2
        gpus=1
    fi
fi
whole_number --gpus "$gpus" 1 1024
if ((found > 0 && gpus > found)); then
    fail "--gpus $gpus: only $found found on this node"
fi

# A restarted worker must not meet the keys of the former attempt in the shared store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# After SIGTERM torchrun kills its workers when this many seconds have passed, 30 by default: less than a large save takes.
# kubernetes.yaml and slurm.sh leave more than this before the end.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}"
if ((nodes == 1 && found == 0)); then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
fi

if [[ "$plan" == true ]] || ((nodes == 1 && gpus == 1 && restarts == 0)); then
    line=("$python" "$root/$system/$entry")
else
    line=("$python" "$root/scripts/ranks.py" "--nproc_per_node=$gpus" "--max-restarts=$restarts")
    if ((nodes == 1)); then
        line+=(--standalone)
    else
        [[ "$master" == *:* ]] || fail "--nodes $nodes needs --master HOST:PORT, the address of node 0"
        [[ -n "$node_rank" ]] || fail "--nodes $nodes needs --node-rank K, from 0 to $((nodes - 1))"
        host="${master%:*}"
        if [[ "$print_only" == false ]] && command -v getent >/dev/null; then
            for try in {1..5}; do # a cluster may need some seconds to know the names of its nodes
                getent ahosts "${host//[\[\]]/}" >/dev/null && break
                ((try < 5)) || fail "--master $master: the name $host is not known here; give the address of node 0"
                sleep 2
            done
        fi
        line+=("--nnodes=$nodes" "--node_rank=$node_rank" "--master_addr=${master%:*}" "--master_port=${master##*:}")
    fi
    line+=("$root/$system/$entry")
fi
line+=("${forwarded[@]}")
if [[ "${line[1]}" == */ranks.py && "$print_only" == false ]]; then
    CHECK_ARGUMENTS=1 "$python" "$root/$system/$entry" "${forwarded[@]}" # a wrong flag is one sentence, not one a process
fi
printf '%q ' "${line[@]}"
printf '\n'
if [[ "$print_only" == true ]]; then
    exit 0
fi
exec "${line[@]}"
