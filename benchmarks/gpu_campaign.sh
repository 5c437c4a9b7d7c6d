#!/usr/bin/env bash
# Runs every measurement on one GPU: benchmarks/gpu_campaign.sh OUT. It takes under 8 minutes, because each part has a
# time limit.
#
# The script reads the dataset from DATA_DIR, uses PYTHON (default: python) and installs nothing. It writes to OUT:
# throughput_*.json, each run's summary (RECIPE.json) and evaluation (RECIPE_evaluate.json), and a log of each part. It
# reports parts that fail or exceed their limit at the end, with exit status 1. A throughput part that exceeds its limit
# keeps the batch sizes it has finished. PyTorch's autotuned compilation is the slowest part and comes last.
#
# CAMPAIGN_RUNS: recipe:epochs:seconds …; CAMPAIGN_EVALUATION: seconds of an evaluation; CAMPAIGN_THROUGHPUT:
# model:dtype:batch,sizes:frameworks:seconds …; CAMPAIGN_FLAGS: more flags of benchmarks.throughput. An empty value skips
# the part.
set -u
[ $# -eq 1 ] || { echo "usage: benchmarks/gpu_campaign.sh OUT" >&2; exit 2; }
DATA_DIR=${DATA_DIR:+$(realpath "$DATA_DIR")} || exit 2  # absolute, because of the cd below
PYTHON=${PYTHON:-python}
case $PYTHON in */*) PYTHON=$(realpath -s "$PYTHON") || exit 2 ;; esac  # -s keeps the link: its target has no packages
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
eager=jax,pytorch,pytorch-cudagraphs
runs=${CAMPAIGN_RUNS-lenet5_reference:15:60 all_cnn_reference:20:60}
evaluation=${CAMPAIGN_EVALUATION:-25}
parts=${CAMPAIGN_THROUGHPUT-all_cnn:bfloat16:512:$eager:70 lenet5:float32:4:$eager:55 all_cnn:bfloat16:512:jax,pytorch-compile:110}
flags=${CAMPAIGN_FLAGS---rounds 5 --seconds-per-round 0.1 --timeout 40}
workdirs=$(mktemp -d)
trap 'rm -rf "$workdirs"' EXIT
trap 'kill "$running" 2>/dev/null; wait; exit 130' INT TERM  # each part has its own process group
running= failed=()

part() {  # NAME SECONDS COMMAND…: the caller redirects stdout; stderr goes to NAME.log
  local name=$1 seconds=$2
  shift 2
  timeout -k 10 "$seconds" "$@" 2>>"$OUT/$name.log" &
  running=$!
  wait "$running" || failed+=("$name ($*): exit status $?")
}

for run in $runs; do
  IFS=: read -r recipe epochs seconds <<<"$run"
  workdir=$workdirs/$recipe
  part "$recipe" "$seconds" "$PYTHON" -m cifar_jax.train "$recipe" --num-epochs "$epochs" --workdir "$workdir" \
    ${DATA_DIR:+--data-dir "$DATA_DIR"} >>"$OUT/$recipe.log"
  [ -e "$workdir/summary.json" ] || continue  # it also exists if the run was stopped after an epoch
  cp "$workdir/summary.json" "$OUT/$recipe.json"
  part "$recipe" "$evaluation" "$PYTHON" -m cifar_jax.evaluate --workdir "$workdir" --json \
    ${DATA_DIR:+--data-dir "$DATA_DIR"} >"$workdirs/evaluate.json"
  [ ! -s "$workdirs/evaluate.json" ] || mv "$workdirs/evaluate.json" "$OUT/${recipe}_evaluate.json"
done
for spec in $parts; do
  IFS=: read -r model dtype sizes frameworks seconds <<<"$spec"
  name=throughput_${model}_${dtype}_${frameworks//,/_}
  # shellcheck disable=SC2086  # $flags holds several words
  part "$name" "$seconds" "$PYTHON" -m benchmarks.throughput --out "$OUT" --name "$name" --models "$model" \
    --dtype "$dtype" --batch-sizes ${sizes//,/ } --frameworks ${frameworks//,/ } $flags >>"$OUT/$name.log"
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
