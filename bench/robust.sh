#!/usr/bin/env bash
# The runs behind docs/ROBUST.md: mode robust and its simple rivals, on exemplars as queries and on queries nobody has seen.
#   bench/robust.sh NAME SOURCE WEIGHTS MODEL [options of the source and the model …]
# An interrupted run goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 source=$2 weights=$3 model=$4
shift 4
out=bench/results/robust
mkdir -p "$out"
engine bench rivals "$source" --weights "$weights" --model "$model" --name "$name" --seed 3 \
  --exemplars "${EXEMPLARS:-2000}" --queries "${QUERIES:-100}" --out "$out/rivals-$(echo "$name" | tr 'A-Z ' 'a-z-').jsonl" "$@"
