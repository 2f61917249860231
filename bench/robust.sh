#!/usr/bin/env bash
# The runs behind docs/ROBUST.md: mode robust and its rivals, on exemplars as queries and on queries nobody has seen.
#   bench/robust.sh NAME SOURCE WEIGHTS MODEL [options of the source and the model …]
# An interrupted run goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 source=$2 weights=$3 model=$4
shift 4
file=$(echo "$name" | tr 'A-Z ' 'a-z-')
out=bench/results/robust
mkdir -p "$out"
run() {
  engine bench "$1" "$source" --weights "$weights" --model "$model" --name "$name" --exemplars "${EXEMPLARS:-2000}" \
    --out "$out/$1-$file.jsonl" "${@:2}"
}
run rivals --seed 3 --queries "${QUERIES:-100}" "$@"
run radius --seed 3 --queries "${QUERIES:-100}" --held-out --kinds gaussian --methods "cosine,stretch=true;robust" "$@"
run robustness --seed 3 --queries "${FEW:-20}" --methods "cosine,stretch=true;fast;robust" --families adaptive "$@"
