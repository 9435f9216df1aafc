#!/usr/bin/env bash
# GQA test-dev balanced: accuracy, by GQA's own eval.py.
. "$(dirname "$0")/common.sh"
split=llava_gqa_testdev_balanced
answers=$DATA/gqa/answers/$split/$name/merge.jsonl
run_sharded model_vqa_loader "$answers" --question-file "$DATA/gqa/$split.jsonl" --image-folder "$DATA/gqa/data/images"
python scripts/convert_gqa_for_eval.py --src "$answers" --dst "$DATA/gqa/data/testdev_balanced_predictions.json"
cd "$DATA/gqa/data" && python eval/eval.py --tier testdev_balanced
