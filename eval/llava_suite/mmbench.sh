#!/usr/bin/env bash
# MMBench, development split: a sheet for the evaluation server.
. "$(dirname "$0")/common.sh"
split=mmbench_dev_20230712
folder=$DATA/mmbench
run model_vqa_mmbench "$folder/answers/$split/$name.jsonl" --question-file "$folder/$split.tsv" --single-pred-prompt
mkdir -p "$folder/answers_upload/$split"
python scripts/convert_mmbench_for_submission.py --annotation-file "$folder/$split.tsv" \
    --result-dir "$folder/answers/$split" --upload-dir "$folder/answers_upload/$split" --experiment "$name"
