#!/usr/bin/env bash
# The runs behind docs/AUDIT.md: what an audit finds of planted copies, leaks, flipped labels and foreign images.
#   CLEANLAB=PYTHON bench/audit.sh NAME SOURCE WEIGHTS FOREIGN [options of the source and the model …]
# An interrupted run goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 source=$2 weights=$3 foreign=$4
shift 4
out=bench/results/audit
mkdir -p "$out"
engine bench audit "$source" --model resnet18 --weights "$weights" --name "$name" --foreign "$foreign" \
  --exemplars "${EXEMPLARS:-2000}" ${CLEANLAB:+--cleanlab "$CLEANLAB"} \
  --out "$out/audit-$(echo "$name" | tr 'A-Z ' 'a-z-').jsonl" "$@"
