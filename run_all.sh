#!/usr/bin/env bash
# From a bare machine to a page of results: environment, then train, resume, generate and evaluate each system on its sample data.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$root"

usage() {
    cat <<'TEXT'
usage: bash run_all.sh [options]

Without options: makes the environment (.venv), trains the `small` preset of every system on the small real data in the repository,
resumes it, generates, evaluates, and writes outputs/index.html. A second run continues where the first one ended.

  --only NAME        one of float, opens2v, bagel, dit, multimodal; repeatable
  --preset NAME      preset of every system, default small
  --gpus N           processes; default: the GPUs found, or one process on the CPU
  --strategy S       none, ddp, fsdp, zero1, zero2 or zero3
  --output-dir DIR   default outputs
  --max-steps N      bound every training phase, for a quick look
  --offline          never ask the network for anything
  --help             this text

The multimodal pipeline on real data (download, three stages, evaluation, report); any of these flags selects it:
  --model-size tiny|small|base|large  --batch-size N  --epochs N  --lr X  --data-root DIR  --datasets NAME...  --resume PATH  --skip-download
TEXT
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

all=(float opens2v bagel dit multimodal)
only=() preset=small output=outputs offline=false skip_download=false pipeline=false data_root="" datasets=()
launch=() train=() multimodal=()
while (($#)); do
    case "$1" in
    --only | --preset | --gpus | --strategy | --output-dir | --max-steps | --model-size | --batch-size | --epochs | --lr | --data-root | --resume)
        (($# >= 2)) || fail "$1 needs a value"
        case "$1" in
        --only)
            [[ " ${all[*]} " == *" $2 "* ]] || fail "--only $2: one of ${all[*]}"
            only+=("$2")
            ;;
        --preset) preset="$2" ;;
        --gpus) launch+=(--gpus "$2") ;;
        --strategy | --max-steps) train+=("$1" "$2") ;;
        --output-dir) output="$2" ;;
        --data-root)
            data_root="$2"
            pipeline=true
            ;;
        *)
            multimodal+=("$1" "$2")
            pipeline=true
            ;;
        esac
        shift 2
        ;;
    --datasets)
        shift
        while (($#)) && [[ "$1" != --* ]]; do
            datasets+=("$1")
            shift
        done
        ((${#datasets[@]})) || fail "--datasets needs one name or more"
        pipeline=true
        ;;
    --offline)
        offline=true
        shift
        ;;
    --skip-download)
        skip_download=true
        pipeline=true
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) fail "unknown option $1 (see --help)" ;;
    esac
done
((${#only[@]})) || only=("${all[@]}")

bash scripts/setup_environment.sh
python="$root/.venv/bin/python"
export HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
if [[ "$offline" == true ]]; then
    export HF_HUB_OFFLINE=1 WANDB_MODE=offline
fi

if [[ "$pipeline" == true ]]; then
    data_root="${data_root:-data}"
    out="$output/multimodal"
    if [[ "$skip_download" == false && "$offline" == false ]]; then
        if ((${#datasets[@]} == 0)); then datasets=(coco clotho audiocaps); fi
        code=0
        "$python" multimodal/download_datasets.py --datasets "${datasets[@]}" --data-root "$data_root" --skip-existing --yes || code=$?
        if ((code != 0 && code != 4)); then # 4: some steps are left to be done by hand, and were named
            echo "the data could not be fetched (see above): mend the network, or put the files into $data_root and add --skip-download," >&2
            echo "or train on the sample data in the repository: bash run_all.sh --only multimodal" >&2
            exit 2
        fi
    fi
    if ((${#datasets[@]})); then multimodal+=(--datasets "${datasets[@]}"); fi
    bash scripts/launch.sh "${launch[@]}" multimodal --config default --data-root "$data_root" --output-dir "$out" "${multimodal[@]}" "${train[@]}"
    "$python" multimodal/metrics.py --checkpoint "$out" --output "$out/metrics.json"
    echo "report: $out/report.html"
    exit 0
fi

mkdir -p "$output/logs"
started=$SECONDS
failed=() reports=() notes=()

# Run one phase of one system, showing its lines and keeping them in the system's log.
phase() {
    local system="$1" what="$2" log="$output/logs/$1.log" code=0
    shift 2
    printf '\n[%d:%02d] %s (%d of %d): %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$system" "$number" "${#only[@]}" "$what"
    { "$@" 2>&1 | tee -a "$log" | sed "s/^/  /"; } || code=$?
    if ((code != 0)); then
        printf '  %s failed while it should %s; its log is %s\n' "$system" "$what" "$log" >&2
        failed+=("$system ($what; log $log)")
        return 1
    fi
}

number=0
for system in "${only[@]}"; do
    number=$((number + 1))
    out="$output/$system"
    : >"$output/logs/$system.log"
    train_command=(bash scripts/launch.sh "${launch[@]}" "$system" --config "$preset" --output-dir "$out" "${train[@]}")
    case "$system" in
    float | opens2v) made="$out/samples/generated.mp4" ;;
    *) made="$out/samples/generated.png" ;;
    esac
    phase "$system" train "${train_command[@]}" &&
        phase "$system" resume "${train_command[@]}" &&
        phase "$system" generate "$python" "$system/generate.py" --checkpoint "$out" --output "$made" &&
        phase "$system" evaluate "$python" "$system/metrics.py" --checkpoint "$out" --output "$out/metrics.json" || true
    if [[ -f "$out/report.json" ]]; then reports+=("$out/report.json"); fi
done

for item in "${failed[@]}"; do
    notes+=(--note "Failed: $item")
done
"$python" -m shared.report "${reports[@]}" --output "$output/index.html" "${notes[@]}" >/dev/null
printf '\n[%d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "results: $output/index.html"
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
