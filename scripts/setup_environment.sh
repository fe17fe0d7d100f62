#!/usr/bin/env bash
# Make the virtual environment .venv in the repository's root with everything of requirements.txt. Safe to run again.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

usage() {
    cat <<'TEXT'
usage: scripts/setup_environment.sh [--python PATH]

Makes .venv (Python 3.11) and installs requirements.txt. Does nothing when that was done before for the same requirements.
On a machine whose package index offers torch only with CUDA, and which has no GPU, install the CPU build of torch first.
TEXT
}

python="${PYTHON:-}"
while (($#)); do
    case "$1" in
    --python)
        [[ -n "${2:-}" ]] || { echo "error: --python needs a path" >&2; exit 2; }
        python="$2"
        shift 2
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        printf 'error: unknown option %s (see --help)\n' "$1" >&2
        exit 2
        ;;
    esac
done

if [[ -z "$python" ]]; then
    for candidate in python3.11 python3 python; do
        if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            python="$candidate"
            break
        fi
    done
fi
[[ -n "$python" ]] || { echo "error: Python 3.11 was not found; install it or give --python PATH" >&2; exit 2; }
if ! found="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"; then
    printf 'error: --python %s: not a Python that runs; give the path of Python 3.11\n' "$python" >&2
    exit 2
fi
[[ "$found" == 3.11 ]] || { printf 'error: --python %s is Python %s; 3.11 is needed\n' "$python" "$found" >&2; exit 2; }

mark=".venv/installed"
wanted="$(cksum <requirements.txt)"
if [[ -f "$mark" && "$(cat "$mark")" == "$wanted" ]]; then
    echo "environment: .venv is up to date"
    exit 0
fi
echo "environment: making .venv with $("$python" --version)"
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
# torch first: what comes after is satisfied by the version that is there.
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
printf '%s\n' "$wanted" >"$mark"
echo "environment: ready (.venv)"
