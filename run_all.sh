#!/usr/bin/env bash
# From a bare machine to a page of results: environment, then train, resume, generate and evaluate each system on its sample data.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$root"

usage() {
    cat <<'TEXT'
usage: bash run_all.sh [options]

Without options: makes the environment (.venv), trains the `small` preset of every system on the small real data in the repository,
resumes it, generates, evaluates, and writes outputs/index.html, which shows from the start what is going on and fills as results
come. A second run continues where the first one ended. On a GPU, systems that have a preset `showcase` train that (not under fsdp
and ZeRO).

  --only NAME        one of float, opens2v, bagel, dit, multimodal; repeatable
  --preset NAME      preset of every system that has it; showcase: the others train small
  --gpus N           processes; default: the GPUs found, or one process on the CPU
  --strategy S       none, ddp, fsdp, zero1, zero2 or zero3
  --output-dir DIR   default outputs
  --max-steps N      bound every training phase, for a quick look
  --jobs N           systems at a time; default 2 on a CPU with two cores or more, 1 with GPUs or --gpus
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

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then fail "bash 4.4 or newer is needed, this is $BASH_VERSION"; fi
all=(float opens2v bagel dit multimodal)
only=() preset="" output=outputs offline=false skip_download=false pipeline=false data_root="" datasets=()
launch=() train=() multimodal=() jobs="" strategy=""
while (($#)); do
    case "$1" in
    --only | --preset | --gpus | --strategy | --output-dir | --max-steps | --jobs | --model-size | --batch-size | --epochs | --lr | --data-root | --resume)
        [[ -n "${2:-}" && "$2" != --* ]] || fail "$1 needs a value"
        case "$1" in
        --only)
            [[ " ${all[*]} " == *" $2 "* ]] || fail "--only $2: one of ${all[*]}"
            only+=("$2")
            ;;
        --preset) preset="$2" ;;
        --gpus) launch+=(--gpus "$2") jobs="${jobs:-1}" ;;
        --jobs)
            [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "--jobs $2: a number from 1 is wanted"
            jobs="$2"
            ;;
        --strategy | --max-steps)
            train+=("$1" "$2")
            [[ "$1" == --max-steps ]] || strategy="$2"
            ;;
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
place="$output"
until [[ -e "$place" || -L "$place" || "$place" == "$(dirname "$place")" ]]; do place="$(dirname "$place")"; done
[[ -d "$place" && -w "$place" ]] || fail "--output-dir $output: $place is not a folder that can be written to; give another path"

gpu=false
if nvidia-smi -L >/dev/null 2>&1; then gpu=true; fi
# The preset that a system trains: the one that was asked for; showcase where there is one, when asked for or on a GPU.
preset_of() {
    local wanted="$preset"
    # Muon, by which showcase trains, needs whole matrices, which these strategies deal to the ranks
    if [[ -z "$wanted" && "$gpu" == true && ! "$strategy" =~ ^(fsdp|zero) ]]; then wanted=showcase; fi
    if [[ -f "$1/configs/${wanted:-small}.yaml" ]]; then
        echo "${wanted:-small}"
    elif [[ "$wanted" == showcase ]]; then
        echo small
    fi
}
for system in "${only[@]}"; do
    if [[ "$pipeline" == true ]]; then break; fi
    [[ -n "$(preset_of "$system")" ]] || fail "--preset $preset: $system has no such preset; give --only, or one of $system/configs/*.yaml"
    if [[ "$preset" == showcase && "$(preset_of "$system")" == small ]]; then echo "$system has no preset showcase: it trains small"; fi
done

bash scripts/setup_environment.sh
python="$root/.venv/bin/python"
export HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
if [[ "$offline" == true ]]; then
    export HF_HUB_OFFLINE=1 WANDB_MODE=offline
fi

# What is wrong in the values is said before anything is fetched, made or trained.
if ((${#launch[@]})); then bash scripts/launch.sh "${launch[@]}" --print-command multimodal >/dev/null; fi
if [[ "$pipeline" == true ]]; then
    data_root="${data_root:-data}"
    out="$output/multimodal"
    if ((${#datasets[@]})); then multimodal+=(--datasets "${datasets[@]}"); fi
    CHECK_ARGUMENTS=1 "$python" multimodal/train.py --config default --data-root "$data_root" "${multimodal[@]}" "${train[@]}"
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
    bash scripts/launch.sh "${launch[@]}" multimodal --config default --data-root "$data_root" --output-dir "$out" "${multimodal[@]}" "${train[@]}"
    "$python" multimodal/metrics.py --checkpoint "$out" --output "$out/metrics.json"
    echo "report: $out/report.html"
    exit 0
fi

for system in "${only[@]}"; do
    CHECK_ARGUMENTS=1 "$python" "$system/train.py" --config "$(preset_of "$system")" "${train[@]}"
done

mkdir -p "$output/logs"
# nproc answers with OMP_NUM_THREADS where that is set, and then systems would run one after another
cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)"
if [[ -z "$jobs" ]]; then
    jobs=1
    if ((cores >= 2)) && [[ "$gpu" == false ]]; then jobs=2; fi
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / jobs > 0 ? cores / jobs : 1))}"
export PYTHONUNBUFFERED=1
started=$SECONDS
marks="$(mktemp -d)" # for each system: what it does now, when it began, that it ended; and each phase that failed
watcher=""
trap '[[ -z "$watcher" ]] || kill "$watcher" 2>/dev/null || true; rm -rf "$marks"' EXIT
trap 'trap - INT TERM; kill 0' INT TERM

# Processor minutes that `small` took, train to report, where the README's results were made; they only tell the time left.
declare -A minutes=([float]=3 [opens2v]=10 [dit]=7 [bagel]=8 [multimodal]=3)

clock() { printf '%d:%02d' $((($1) / 60)) $((($1) % 60)); }

# About how many minutes are left: of each system what it took where it was measured, less what it has had already.
left() {
    local total=0 system began rest
    for system in "${only[@]}"; do
        [[ ! -e "$marks/ended_$system" ]] || continue
        rest=$((${minutes[$system]} * 60))
        if [[ -e "$marks/began_$system" ]]; then
            began="$(cat "$marks/began_$system")"
            rest=$((rest - (SECONDS - began)))
        fi
        total=$((total + (rest > 30 ? rest : 30)))
    done
    if [[ -z "$preset" && "$gpu" == false && ${#train[@]} -eq 0 ]]; then
        echo "; about $(((total / jobs + 59) / 60)) minutes to the end"
    fi
}

state_of() { cat "$marks/state_$1" 2>/dev/null || echo waits; }

# The page of results as it is now: what is going on, and the reports that are there. Arguments go to the page.
page() {
    local reports=() states=() notes=() system
    for system in "${only[@]}"; do
        if [[ -f "$output/$system/report.json" && -e "$marks/ended_$system" ]]; then reports+=("$output/$system/report.json"); fi
        if [[ -f "$marks/failed_$system" ]]; then notes+=(--note "Failed: $(cat "$marks/failed_$system")"); fi
        if [[ " $* " == *" --running "* ]]; then states+=(--state "$system=$(state_of "$system")"); fi
    done
    "$python" -m shared.report.page "${reports[@]}" --output "$output/index.html" --logs "$output/logs" "${notes[@]}" "${states[@]}" "$@" \
        >/dev/null
}

# Every half minute the page, every minute one line: what each running system does, and what is left.
watch() {
    local round=0 system line last
    while sleep 30; do
        page --running || true
        round=$((round + 1))
        ((round % 2 == 0)) || continue
        line=""
        for system in "${only[@]}"; do
            [[ -e "$marks/began_$system" && ! -e "$marks/ended_$system" ]] || continue
            last="$(tr '\r' '\n' <"$output/logs/$system.log" | sed -n 's/^Step \([0-9]*\), Loss[^|]*| of \([0-9]*\) .*/step \1 of \2/p' | tail -n 1)"
            [[ "$(state_of "$system")" == train ]] || last=""
            line+="${line:+, }$system: $(state_of "$system")${last:+ $last}"
        done
        printf '[%s] %s%s\n' "$(clock $((SECONDS - started)))" "$line" "$(left)"
    done
}

# One line on the console: the time, the system, its phase, and what is left of the whole.
tell() {
    echo "$2" >"$marks/state_$1"
    printf '\n[%s] %s (%d of %d ended): %s%s\n' "$(clock $((SECONDS - started)))" "$1" \
        "$(find "$marks" -name 'ended_*' | wc -l)" "${#only[@]}" "$2" "$(left)"
}

# Run one phase of one system, showing its lines and keeping them in the system's log.
phase() {
    local system="$1" what="$2" log="$output/logs/$1.log" code=0
    shift 2
    tell "$system" "$what"
    { "$@" 2>&1 | tee -a "$log" | sed -u "s/^/  $system: /"; } || code=$?
    if ((code != 0)); then
        printf '  %s failed while it should %s; its log is %s\n' "$system" "$what" "$log" >&2
        echo "$system ($what; log $log)" >"$marks/failed_$system"
        return 1
    fi
}

# Train, resume, generate and evaluate one system.
whole() {
    local system="$1" out="$output/$1" made
    : >"$output/logs/$system.log"
    echo "$SECONDS" >"$marks/began_$system"
    local train_command=(bash scripts/launch.sh "${launch[@]}" "$system" --config "$(preset_of "$system")" --output-dir "$out" "${train[@]}")
    case "$system" in
    float | opens2v) made="$out/samples/generated.mp4" ;;
    *) made="$out/samples/generated.png" ;;
    esac
    phase "$system" train "${train_command[@]}" &&
        phase "$system" resume "${train_command[@]}" &&
        phase "$system" generate "$python" "$system/generate.py" --checkpoint "$out" --output "$made" &&
        phase "$system" evaluate "$python" "$system/metrics.py" --checkpoint "$out" --output "$out/metrics.json" || true
    if [[ -f "$marks/failed_$system" ]]; then echo failed >"$marks/state_$system"; else echo "has ended" >"$marks/state_$system"; fi
    : >"$marks/ended_$system"
}

page --running
echo "results, as they come: $output/index.html"
watch &
watcher=$!

workers=()
for system in "${only[@]}"; do
    while ((${#workers[@]} >= jobs)); do
        wait -n "${workers[@]}" || true
        alive=()
        for worker in "${workers[@]}"; do
            if kill -0 "$worker" 2>/dev/null; then alive+=("$worker"); fi
        done
        workers=("${alive[@]}")
    done
    whole "$system" &
    workers+=("$!")
done
wait "${workers[@]}" || true
kill "$watcher" 2>/dev/null || true
wait "$watcher" 2>/dev/null || true
watcher=""

reports=() failed=()
for system in "${only[@]}"; do
    if [[ -f "$output/$system/report.json" ]]; then reports+=("$output/$system/report.json"); fi
    if [[ -f "$marks/failed_$system" ]]; then failed+=("$(cat "$marks/failed_$system")"); fi
done
page
"$python" -m shared.report.figure "${reports[@]}" --output "$output/figure.jpg" >/dev/null || true
printf '\n[%s] results: %s\n' "$(clock $((SECONDS - started)))" "$output/index.html"
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
