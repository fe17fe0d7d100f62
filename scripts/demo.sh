#!/usr/bin/env bash
# The five systems in a browser, over the checkpoints of run_all.sh or any others. Gradio lives in an environment of its own.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
packages=("gradio==6.31.0" "pillow==12.3.0") # this gradio wants a pillow below 13, the trainings use 13

usage() {
    cat <<'TEXT'
usage: bash scripts/demo.sh [--install] [options]

  --install                 make .venv-demo with gradio first (asks the package index, once)
  --runs DIR                folder with a run of each system, default outputs (what run_all.sh writes)
  --checkpoint SYSTEM=PATH  another run, checkpoint or public weights for float, opens2v, bagel, dit or multimodal; repeatable
  --host HOST               default 127.0.0.1: only this machine; 0.0.0.0 lets others in, who then cannot name folders
  --port N                  default 7860
  --help                    this text

A photo and a recording become a video; a subject and a sentence become a video; chat with pictures and edits; a sentence
becomes a picture; search a folder by text, picture or sound. Nothing leaves this machine.
TEXT
}

install=false forwarded=()
while (($#)); do
    case "$1" in
    --install) install=true ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) forwarded+=("$1") ;;
    esac
    shift
done
if [[ ! -x .venv/bin/python ]]; then
    echo "error: .venv is missing; run: bash scripts/setup_environment.sh" >&2
    exit 2
fi
if [[ "$install" == true ]]; then
    [[ -x .venv-demo/bin/python ]] || .venv/bin/python -m venv .venv-demo
    .venv-demo/bin/python -m pip install --quiet --disable-pip-version-check "${packages[@]}"
fi
if [[ ! -x .venv-demo/bin/python ]] || ! .venv-demo/bin/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("gradio"))'; then
    echo "error: the demo needs ${packages[*]}; run: bash scripts/demo.sh --install" >&2
    exit 2
fi
exec .venv-demo/bin/python -m scripts.demo.app "${forwarded[@]}"
