#!/usr/bin/env bash
# MME: perception and cognition, by MME's own tools.
. "$(dirname "$0")/common.sh"
run model_vqa_loader "$DATA/MME/answers/$name.jsonl" \
    --question-file "$DATA/MME/llava_mme.jsonl" --image-folder "$DATA/MME/MME_Benchmark_release_version"
cd "$DATA/MME" && python convert_answer_to_mme.py --experiment "$name"
cd eval_tool && python calculation.py --results_dir "answers/$name"
