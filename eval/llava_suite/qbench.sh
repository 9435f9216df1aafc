#!/usr/bin/env bash
# Q-Bench (LLVisionQA): accuracy on dev; SPLIT=test writes what its leaderboard takes.
. "$(dirname "$0")/common.sh"
convert=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/qbench.py
records=$DATA/qbench/llvisionqa_${SPLIT:-dev}.json
answers=$DATA/qbench/answers/${SPLIT:-dev}/$name
python "$convert" "$records" --questions "$answers.questions.jsonl"
run_sharded model_vqa_loader "$answers.jsonl" \
    --question-file "$answers.questions.jsonl" --image-folder "$DATA/qbench/images_llvisionqa"
python "$convert" "$records" --answers "$answers.jsonl" --submission "${answers}_submission.jsonl"
