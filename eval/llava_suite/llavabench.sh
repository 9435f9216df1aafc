#!/usr/bin/env bash
# LLaVA-Bench (in the wild): answers, and their review by GPT-4, for which OPENAI_API_KEY is needed.
. "$(dirname "$0")/common.sh"
folder=$DATA/llava-bench-in-the-wild
run model_vqa "$folder/answers/$name.jsonl" --question-file "$folder/questions.jsonl" --image-folder "$folder/images"
mkdir -p "$folder/reviews"
python llava/eval/eval_gpt_review_bench.py --question "$folder/questions.jsonl" --context "$folder/context.jsonl" \
    --rule llava/eval/table/rule.json --output "$folder/reviews/$name.jsonl" \
    --answer-list "$folder/answers_gpt4.jsonl" "$folder/answers/$name.jsonl"
python llava/eval/summarize_gpt_review.py -f "$folder/reviews/$name.jsonl"
