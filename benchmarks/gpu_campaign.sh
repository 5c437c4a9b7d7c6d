#!/usr/bin/env bash
# Measures this project on one GPU, in order of worth, in 10 minutes: benchmarks/gpu_campaign.sh OUT
#
# It reads CIFAR-10 from DATA_DIR (default: the standard places), uses PYTHON (default: python) and installs nothing.
# Each part has a time limit. OUT gets a JSON file for each result, and for each part NAME its stdout (NAME.txt) and
# stderr (NAME.log). A part that fails or exceeds its limit is reported at the end, with exit status 1; what it has
# written stays. A training that exceeds its limit saves its state and has the summary of its epochs.
set -u
[ $# -eq 1 ] || { echo "usage: benchmarks/gpu_campaign.sh OUT" >&2; exit 2; }
DATA_DIR=${DATA_DIR:+$(realpath "$DATA_DIR")} || exit 2  # absolute, because of the cd below
PYTHON=${PYTHON:-python}
case $PYTHON in */*) PYTHON=$(realpath -s "$PYTHON") || exit 2 ;; esac  # -s keeps the link: its target has no packages
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}  # the trainings would take all GPUs
export JAX_PLATFORMS=cuda,cpu CIFAR_JAX_TEST_PLATFORMS=cuda,cpu
"$PYTHON" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' || { echo "JAX finds no GPU" >&2; exit 2; }
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
trap stop INT TERM HUP
failed=()

stop() {  # each part's process group outlives a `timeout` that the signal met while it forked
  for job in $(jobs -p); do kill "$job"; wait "$job"; kill -- "-$job"; done 2>/dev/null
  exit 130
}

part() {  # NAME SECONDS COMMAND…
  local name=$1 seconds=$2
  shift 2
  timeout -k 5 "$seconds" "$PYTHON" "$@" >"$OUT/$name.txt" 2>"$OUT/$name.log" &
  wait $! || failed+=("$name: exit status $?, see $name.log")
}

train() {  # RECIPE SECONDS FLAG…: trains a recipe, then measures it on the test set
  part "$1" "$2" -m cifar_jax.train "$1" "${@:3}" --workdir "$runs/$1" ${DATA_DIR:+--data-dir "$DATA_DIR"}
  [ -e "$runs/$1/summary.json" ] || return
  cp "$runs/$1/summary.json" "$OUT/$1.json"
  part "$1_evaluate" 15 -m cifar_jax.evaluate --workdir "$runs/$1" --json ${DATA_DIR:+--data-dir "$DATA_DIR"}
  [ ! -s "$OUT/$1_evaluate.txt" ] || mv "$OUT/$1_evaluate.txt" "$OUT/$1_evaluate.json"
}

throughput() {  # NAME SECONDS FLAG…: images a second
  part "throughput_$1" "$2" -m benchmarks.throughput --out "$OUT" --name "throughput_$1" --rounds 5 \
    --seconds-per-round 0.1 --timeout 40 "${@:3}"
}

# pytest has no handler of SIGTERM, and would not tell which tests failed before the time limit.
pytest='import pytest, signal, sys
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))'

part smoke 90 -c "$pytest" -W default -n 0 -m gpu tests/test_gpu.py
train all_cnn_reference 150 --steps-per-call 46  # of 782 an epoch: a call is short, so the time limit finds it soon
throughput all_cnn 75 --models all_cnn --dtype bfloat16 --batch-sizes 512 --frameworks jax pytorch pytorch-cudagraphs
throughput lenet5 50 --models lenet5 --batch-sizes 128 --frameworks jax pytorch pytorch-cudagraphs
train all_cnn_fast 70
throughput compiled 95 --models all_cnn --dtype bfloat16 --batch-sizes 512 --phases training --frameworks jax pytorch-compile

[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; }
