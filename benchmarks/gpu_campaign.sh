#!/usr/bin/env bash
# Every measurement on one GPU: benchmarks/gpu_campaign.sh OUT. Under 8 minutes, as each part has its limit.
#
# Reads the training recipes' data from DATA_DIR, uses PYTHON (python), and installs nothing. OUT gets throughput_*.json,
# each run's summary as RECIPE.json, its evaluation as RECIPE_evaluate.json, and a log of each part. A part that fails
# or is cut off is named at the end, with exit status 1. A throughput part that is cut off leaves the workloads before.
#
# CAMPAIGN_RUNS: recipe:epochs:seconds …; CAMPAIGN_EVALUATION: seconds of an evaluation; CAMPAIGN_THROUGHPUT:
# model:dtype:batch,sizes:seconds …; CAMPAIGN_FLAGS: more flags of benchmarks.throughput.
set -u
[ $# -eq 1 ] || { echo "usage: benchmarks/gpu_campaign.sh OUT" >&2; exit 2; }
DATA_DIR=${DATA_DIR:+$(realpath "$DATA_DIR")} || exit 2  # before the cd
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python}
runs=${CAMPAIGN_RUNS:-lenet5_reference:15:60 lenet5:224:64 all_cnn_reference:20:60}
evaluation=${CAMPAIGN_EVALUATION:-15}
parts=${CAMPAIGN_THROUGHPUT:-all_cnn:bfloat16:64,512,1024:80 lenet5:float32:4,128,1024:65 all_cnn:float32:64,512,1024:60}
flags=${CAMPAIGN_FLAGS:---frameworks jax pytorch pytorch-compile pytorch-cudagraphs --rounds 5 --seconds-per-round 0.5 --timeout 60}
workdirs=$(mktemp -d)
trap 'rm -rf "$workdirs"' EXIT
failed=()

part() {  # NAME SECONDS COMMAND…: stdout goes to where the caller says, stderr to NAME.log
  local name=$1 seconds=$2
  shift 2
  timeout -k 5 "$seconds" "$@" 2>>"$OUT/$name.log" || failed+=("$name ($*): exit status $?")
}

for run in $runs; do
  IFS=: read -r recipe epochs seconds <<<"$run"
  workdir=$workdirs/$recipe
  part "$recipe" "$seconds" "$PYTHON" -m cifar_jax.train "$recipe" --num-epochs "$epochs" --workdir "$workdir" \
    ${DATA_DIR:+--data-dir "$DATA_DIR"} >>"$OUT/$recipe.log"
  [ -e "$workdir/summary.json" ] || continue  # also there if the run was cut off after an epoch
  cp "$workdir/summary.json" "$OUT/$recipe.json"
  part "$recipe" "$evaluation" "$PYTHON" -m cifar_jax.evaluate --workdir "$workdir" --json \
    ${DATA_DIR:+--data-dir "$DATA_DIR"} >"$OUT/${recipe}_evaluate.json"
done
for spec in $parts; do
  IFS=: read -r model dtype sizes seconds <<<"$spec"
  name=throughput_${model}_$dtype
  # shellcheck disable=SC2086  # the flags are several words
  part "$name" "$seconds" "$PYTHON" -m benchmarks.throughput --out "$OUT" --name "$name" --models "$model" \
    --dtype "$dtype" --batch-sizes ${sizes//,/ } $flags >>"$OUT/$name.log"
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
