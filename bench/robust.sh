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
common=("$source" --weights "$weights" --model "$model" --name "$name" --seed 2 --exemplars "${EXEMPLARS:-2500}" "$@")
rivals=${RIVALS:-"l2;cosine;cosine,stretch=true;fast;layer,recogniser=pixels;layer,recogniser=layer1;layer,recogniser=layer2;layer,recogniser=layer3"}
levels=(--levels brightness=0.4 --levels contrast=0.4 --levels gaussian=2.5,5 --levels blur=1 --levels jpeg=15 --levels shift=2,4
  --levels rotation=10 --levels crop=0.85 --levels occlusion=0.25 --levels saturation=0 --levels hue=30 --levels dark-noise=1
  --levels crop-blur=0.5)
engine bench robustness "${common[@]}" --queries "${QUERIES:-100}" \
  --families brightness,contrast,gaussian,blur,jpeg,shift,rotation,crop,occlusion,saturation,hue,dark-noise,crop-blur "${levels[@]}" \
  --methods "$rivals;robust,views=1;robust" --out "$out/robustness-$file.jsonl"
engine bench unseen "${common[@]}" --queries "${QUERIES:-100}" --methods "$rivals;robust,views=1;robust;robust,views=10" \
  --out "$out/unseen-$file.jsonl"
