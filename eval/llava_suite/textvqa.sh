#!/usr/bin/env bash
# TextVQA validation, with OCR words in the question: accuracy.
. "$(dirname "$0")/common.sh"
run model_vqa_loader "$DATA/textvqa/answers/$name.jsonl" \
    --question-file "$DATA/textvqa/llava_textvqa_val_v051_ocr.jsonl" --image-folder "$DATA/textvqa/train_images"
python -m llava.eval.eval_textvqa --annotation-file "$DATA/textvqa/TextVQA_0.5.1_val.json" \
    --result-file "$DATA/textvqa/answers/$name.jsonl"
