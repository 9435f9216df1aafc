#!/usr/bin/env bash
# SEED-Bench: accuracy, and answers for the leaderboard.
. "$(dirname "$0")/common.sh"
run_sharded model_vqa_loader "$DATA/seed_bench/answers/$name/merge.jsonl" \
    --question-file "$DATA/seed_bench/llava-seed-bench.jsonl" --image-folder "$DATA/seed_bench"
mkdir -p "$DATA/seed_bench/answers_upload"
python scripts/convert_seed_for_submission.py --annotation-file "$DATA/seed_bench/SEED-Bench.json" \
    --result-file "$DATA/seed_bench/answers/$name/merge.jsonl" \
    --result-upload-file "$DATA/seed_bench/answers_upload/$name.jsonl"
