#!/usr/bin/env bash
# The runs behind docs/CLASSIFY.md: sets of classes, and accuracy where the least trusted tenth is left out.
#   bench/classify.sh NAME SOURCE WEIGHTS MODEL [options of the source and the model …]
# CALIBRATION images and QUERIES queries are of the test split. An interrupted run goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 source=$2 weights=$3 model=$4
shift 4
out=bench/results/classify
mkdir -p "$out"
engine bench classify "$source" --weights "$weights" --model "$model" --name "$name" --seed 3 \
  --exemplars "${EXEMPLARS:-2000}" --queries "${QUERIES:-500}" --calibration "${CALIBRATION:-2000}" --json \
  --out "$out/classify-$(echo "$name" | tr 'A-Z ' 'a-z-').jsonl" "$@"
