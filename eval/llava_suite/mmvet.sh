#!/usr/bin/env bash
# MM-Vet: answers for its evaluator, which asks GPT-4.
. "$(dirname "$0")/common.sh"
run model_vqa "$DATA/mm-vet/answers/$name.jsonl" \
    --question-file "$DATA/mm-vet/llava-mm-vet.jsonl" --image-folder "$DATA/mm-vet/images"
mkdir -p "$DATA/mm-vet/results"
python scripts/convert_mmvet_for_eval.py --src "$DATA/mm-vet/answers/$name.jsonl" --dst "$DATA/mm-vet/results/$name.json"
