#!/usr/bin/env bash
# ScienceQA test, the questions with an image and those without: accuracy.
. "$(dirname "$0")/common.sh"
answers=$DATA/scienceqa/answers/$name
run model_vqa_science "$answers.jsonl" --question-file "$DATA/scienceqa/llava_test_CQM-A.json" \
    --image-folder "$DATA/scienceqa/images/test" --single-pred-prompt
python llava/eval/eval_science_qa.py --base-dir "$DATA/scienceqa" --result-file "$answers.jsonl" \
    --output-file "${answers}_output.jsonl" --output-result "${answers}_result.json"
