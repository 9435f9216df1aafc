#!/usr/bin/env bash
# VizWiz test: answers for the evaluation server.
. "$(dirname "$0")/common.sh"
run model_vqa_loader "$DATA/vizwiz/answers/$name.jsonl" \
    --question-file "$DATA/vizwiz/llava_test.jsonl" --image-folder "$DATA/vizwiz/test"
mkdir -p "$DATA/vizwiz/answers_upload"
python scripts/convert_vizwiz_for_submission.py --annotation-file "$DATA/vizwiz/llava_test.jsonl" \
    --result-file "$DATA/vizwiz/answers/$name.jsonl" --result-upload-file "$DATA/vizwiz/answers_upload/$name.json"
