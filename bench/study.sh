#!/usr/bin/env bash
# The study behind the preset `fast` (docs/REPRODUCTION.md): readings of TMM-NN and baselines side by side, on queries that no
# final figure uses.
#   bench/study.sh NAME SOURCE WEIGHTS MODEL [options of the source and the model …]
# An interrupted run goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 source=$2 weights=$3 model=$4
shift 4
out=bench/results/study
mkdir -p "$out"
g="paper,trigger=global" # one trigger for all, so that hundreds of searches need no pass
d="$g,stretch=true,tuning=discriminant,shrinkage=1"
closed="l2;cosine;l2,stretch=true;cosine,stretch=true;cosine,stretch=true,recognition=0.8" # baselines
for fusion in 0 1 2 4 8 16; do closed="$closed;$d,intensity=0.1,fusion=$fusion"; done
for intensity in 0.05 0.2 0.5; do closed="$closed;$d,intensity=$intensity,fusion=4"; done
for fusion in 2 4 8; do closed="$closed;$d,intensity=0.1,fusion=$fusion,recognition=0.8"; done
for recognition in 0.7 0.9; do closed="$closed;$d,intensity=0.1,fusion=4,recognition=$recognition"; done
closed="$closed;$d,intensity=0.05,fusion=4,recognition=0.8"
closed="$closed;$d,fusion=4;$d,intensity=0.1,shrinkage=0.1,fusion=4;$d,blend=added,fusion=4" # ω = std; less shrinkage; blend
closed="$closed;$d,intensity=0.999,fusion=4;$d,intensity=0.1,trigger_steps=0,fusion=4"       # no trigger; exemplars only darkened
closed="$closed;$d,stretch=false,intensity=0.1,fusion=4"
steps="$g;$g,score=logit;$g,fusion=4;$g,tuning_min_steps=940;$g,tuning_lr=0.01;$g,stretch=true;$g,stretch=true,fusion=4"
steps="$steps;$g,blend=added;$g,blend=added,score=logit;$g,blend=scaled;$g,blend=swapped;$g,clamp=false"
run() {
  engine bench robustness "$source" --weights "$weights" --model "$model" "${@:3}" --name "$name" --exemplars 3000 --seed 0 \
    --families brightness,gaussian,contrast,blur,jpeg,shift --levels brightness=0.7,0.5,0.3,0.1 --levels gaussian=1,2.5,5 \
    --levels contrast=0.5,0.2 --levels blur=1 --levels jpeg=25 --levels shift=1 \
    --methods "$1" --queries "$2" --out "$out/study-$(echo "$name" | tr 'A-Z ' 'a-z-').jsonl"
}
run "$closed" "${QUERIES:-40}" "$@"
run "$steps" "${FEW:-4}" "$@"
