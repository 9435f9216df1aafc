#!/usr/bin/env bash
# VQAv2 test-dev: answers for the evaluation server.
. "$(dirname "$0")/common.sh"
split=llava_vqav2_mscoco_test-dev2015
run_sharded model_vqa_loader "$DATA/vqav2/answers/$split/$name/merge.jsonl" \
    --question-file "$DATA/vqav2/$split.jsonl" --image-folder "$DATA/vqav2/test2015"
python scripts/convert_vqav2_for_submission.py --split "$split" --ckpt "$name" --dir "$DATA/vqav2"
