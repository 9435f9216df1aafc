#!/usr/bin/env bash
# MMBench in Chinese, development split: a sheet for the evaluation server.
. "$(dirname "$0")/common.sh"
split=mmbench_dev_cn_20231003
folder=$DATA/mmbench_cn
run model_vqa_mmbench "$folder/answers/$split/$name.jsonl" --question-file "$folder/$split.tsv" --single-pred-prompt --lang cn
mkdir -p "$folder/answers_upload/$split"
python scripts/convert_mmbench_for_submission.py --annotation-file "$folder/$split.tsv" \
    --result-dir "$folder/answers/$split" --upload-dir "$folder/answers_upload/$split" --experiment "$name"
