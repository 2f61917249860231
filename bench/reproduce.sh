#!/usr/bin/env bash
# The runs behind docs/REPRODUCTION.md, one data set at a time:
#   bench/reproduce.sh NAME SOURCE WEIGHTS MODEL [options of the source and the model …]
# for example
#   bench/reproduce.sh MNIST mnist mnist.safetensors resnet18 --root data
# Records go to bench/results, an interrupted run goes on where it stopped. In those of reproduction/ and paper/ `fast` is still called
# `robust`, as it was when they were made.
# STAGES, QUERIES and FEW choose and size the runs; PAPER_NOISE is what `paper` meets in stage `whole`, which searches all exemplars. The galleries it draws show images of the data sets: never commit those.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 source=$2 weights=$3 model=$4
shift 4
file=$(echo "$name" | tr 'A-Z ' 'a-z-')
out=bench/results/reproduction few_out=bench/results/paper whole_out=bench/results/whole
mkdir -p "$out" "$few_out" "$whole_out"
common=("$source" --weights "$weights" --model "$model" --seed 1 "$@")
main=("${common[@]}" --exemplars 5000 --name "$name")
held=("${common[@]}" --exemplars 5000 --name "$name, held-out queries")
whole=("${common[@]}" --exemplars 1000000 --name "$name") # all there are
small=("${common[@]}" --exemplars 1000 --name "$name, 1,000 exemplars")
noise=(--families brightness,gaussian,contrast,blur,jpeg,shift,pgd,adaptive
  --levels brightness=0.9,0.7,0.5,0.3,0.1 --levels gaussian=0.5,1,2.5,5 --levels contrast=0.6,0.3
  --levels blur=0.5,1 --levels jpeg=50,20 --levels shift=1,2 --levels pgd=0.5,1 --levels adaptive=0.5,1)
few=(--families brightness,gaussian,blur,shift --levels brightness=0.7,0.5,0.3 --levels gaussian=1,2.5,5
  --levels blur=1 --levels shift=1)
recognising="cosine,stretch=true,recognition=0.8" # the baseline with what `fast` has beside its trigger
rivals="l2;cosine;cosine,stretch=true;layer,recogniser=pixels;layer,recogniser=layer2:4x4;robust;fast"
all="l2;cosine;l2,stretch=true;cosine,stretch=true;$recognising;fast"

for stage in ${STAGES:-robustness radius held-out paper semantic ood ablation whole}; do
  case $stage in
  robustness)
    engine bench robustness "${main[@]}" "${noise[@]}" --methods "$all" --queries "${QUERIES:-40}" \
      --out "$out/robustness-$file.jsonl"
    ;;
  radius)
    engine bench radius "${main[@]}" --methods "l2;cosine;$recognising;fast" --queries "${QUERIES:-40}" \
      --out "$out/radius-$file.jsonl"
    ;;
  held-out)
    engine bench radius "${held[@]}" --methods "l2;cosine;$recognising;fast" --queries "${QUERIES:-40}" --held-out \
      --kinds gaussian,brightness --out "$out/radius-held-out-$file.jsonl"
    ;;
  paper) # the preset `paper` passes every exemplar through the network for every query: fewer exemplars, fewer queries
    engine bench robustness "${small[@]}" "${few[@]}" --methods "l2;cosine;paper;fast" --queries "${FEW:-8}" \
      --out "$few_out/paper-$file.jsonl"
    engine bench radius "${small[@]}" --methods "l2;cosine;paper;fast" --queries "${FEW:-8}" --directions 1 \
      --kinds gaussian,brightness --out "$few_out/paper-radius-$file.jsonl"
    ;;
  whole) # few queries with triggers of their own, more with what passes no exemplar for a query
    engine bench robustness "${whole[@]}" --families "${PAPER_NOISE:-brightness,gaussian,shift}" --levels brightness=0.4 \
      --levels gaussian=2.5 --levels shift=2 --methods paper --queries 20 --out "$whole_out/robustness-$file.jsonl"
    engine bench robustness "${whole[@]}" --families brightness,gaussian,shift --levels brightness=0.7,0.4,0.2,0.1 \
      --levels gaussian=1,2.5,5 --levels shift=2 --methods "$rivals" --queries "${QUERIES:-40}" --out "$whole_out/robustness-$file.jsonl"
    ;;
  semantic)
    engine bench semantic "${main[@]}" --methods "l2;cosine;cosine,stretch=true;fast" --queries 200 \
      --gallery "$out/gallery-$file.png" --out "$out/semantic-$file.jsonl"
    ;;
  ood)
    engine bench ood "${main[@]}" --methods "l2;cosine;fast" --queries 24 --foreign noise --out "$out/ood-$file.jsonl"
    ;;
  ablation)
    engine bench ablation "${main[@]}" --base fast --exemplars 2000 --queries "${FEW:-8}" --out "$out/ablation-robust-$file.jsonl"
    engine bench ablation "${small[@]}" --queries "${FEW:-8}" --out "$few_out/ablation-paper-$file.jsonl"
    ;;
  esac
done
