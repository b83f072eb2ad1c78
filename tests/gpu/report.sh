#!/usr/bin/env bash
# What an NVIDIA machine makes of this project, in one file: `make gpu`. Tests, the training benchmark, attention in two
# ways, a short run with its drafter, what they measure and a text.
# DATA: a prepared data folder (default: data/tinystories, prepared from the Hub where it is missing). MINUTES: of the run.
set -u -o pipefail
PYTHON=${PYTHON:-.venv/bin/python} DATA=${DATA:-data/tinystories} MINUTES=${MINUTES:-5}
OUT=build/gpu RUN=build/gpu/run
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch finds no NVIDIA GPU here: run this on one, with a CUDA build of torch" >&2; exit 1
fi
mkdir -p "$OUT" && rm -rf "$RUN" "$RUN-drafter"
step() {  # name, seconds, command ...
    echo; echo "## $1"; local limit=$2; shift 2
    echo "\$ $*"; timeout "$limit" "$@" 2>&1; local code=$?
    [ $code -eq 0 ] || echo "exit code $code"
}
{
    step "device" 60 nvidia-smi
    step "tests" 2700 "$PYTHON" -m pytest -q tests/gpu tests/unit/host/model tests/unit/host/train \
        tests/unit/host/sampling tests/unit/host/evaluate
    [ -d "$DATA" ] || step "data" 3600 "$PYTHON" -m host.data --out "$DATA"
    step "attention" 600 "$PYTHON" -m tests.gpu.attention
    step "training benchmark" 1800 "$PYTHON" -m host.bench train --config tiny small medium --data "$DATA" \
        --objectives ar ar=16,infill=6,canvas=4
    step "training" $((MINUTES * 60 + 900)) "$PYTHON" -m host.train --config medium --data "$DATA" --out "$RUN" \
        --objectives ar=16,infill=6,canvas=4 --minutes "$MINUTES"
    step "drafter" 900 "$PYTHON" -m host.train --stage drafter --init "$RUN" --data "$DATA" --out "$RUN-drafter" --minutes 1
    step "evaluation" 1800 "$PYTHON" -m host.evaluate --run "$RUN-drafter" --split test --drafts --stories 128
    step "text" 300 "$PYTHON" -m host.generate "Once upon a time" --run "$RUN-drafter"
} | tee "$OUT/report.txt"
echo "report: $OUT/report.txt"
grep -q '^exit code' "$OUT/report.txt" && exit 1 || exit 0
