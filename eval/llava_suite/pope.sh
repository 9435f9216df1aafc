#!/usr/bin/env bash
# POPE, three kinds: accuracy, precision, recall, F1.
. "$(dirname "$0")/common.sh"
run model_vqa_loader "$DATA/pope/answers/$name.jsonl" \
    --question-file "$DATA/pope/llava_pope_test.jsonl" --image-folder "$DATA/pope/val2014"
python llava/eval/eval_pope.py --annotation-dir "$DATA/pope/coco" --question-file "$DATA/pope/llava_pope_test.jsonl" \
    --result-file "$DATA/pope/answers/$name.jsonl"
