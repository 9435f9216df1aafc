#!/usr/bin/env bash
# Trains smol-llava as it is in this package: LLaVA's two stages, then Fwd2Bot by the one flag. The methods that it is
# compared with are a study: `python -m eval.studies run eval/studies/smol.yaml --data DATA --work WORK --jobs 2`.
#
#     bash scripts/train_smol_llava.sh DATA [WORK]
#
# DATA holds flickr8k/{train,dev}.jsonl and daquar/train.jsonl with their images (see eval/studies/smol_splits.py). A stopped run goes on where it was.
# Two CPU cores take four to six hours: two processes of one thread each do more than one process of two. On a GPU set
# PROCESSES=1 THREADS=8 DEVICE_ARGS="--per_device_train_batch_size 32".
set -euo pipefail
data=$(realpath "$1") work=$(realpath -m "${2:-smol-work}")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${THREADS:-1} OMP_WAIT_POLICY=PASSIVE
mkdir -p "$work"

train() { # NAME ARGUMENTS…: skipped when its result is there
    local name=$1
    shift
    [ -e "$work/$name.done" ] && return
    # bfloat16 is 1.8 times as fast as float32 on a CPU that has it (AVX512-BF16); eager attention beats the fused kernel
    # there at these lengths
    torchrun --nproc_per_node "${PROCESSES:-2}" --master_port "${PORT:-29510}" -m llava_fwd2bot train \
        --image_folder "$data" --output_dir "$work/$name" --bf16 True --attn_implementation "${ATTENTION:-eager}" \
        --lr_scheduler_type cosine --warmup_steps 20 --logging_steps 20 --save_strategy steps --save_steps 50 \
        --save_total_limit 1 --report_to none --disable_tqdm True --ddp_find_unused_parameters False "$@" ${DEVICE_ARGS:-}
    touch "$work/$name.done"
}

python -m eval.studies.smol_splits --data "$data" --output "$work/data"
# of Fwd2Bot; eval/results/recipe.md says what each of these settings gave
weights=(--fwd2bot_answer_weight 0.5 --fwd2bot_distill_weight 2)
answers=(--data_path "$work/data/stage2.json" "${weights[@]}")
captions=(--fwd2bot_caption_data "$work/data/captions.json")
nested=(--fwd2bot 16 --fwd2bot_nested_k 1,2,4,8,16)
residual=(--fwd2bot_residual average --fwd2bot_pooling first)
method=(--model_name_or_path smol-llava --lora_r 12 --lora_alpha 24 --learning_rate 1e-3 --summary_lr 1e-2
    --group_by_modality_length True --per_device_train_batch_size 12)

[ -e "$work/untrained/config.json" ] || python scripts/build_smol_llava.py --untrained --output "$work/untrained"

# 1. the projector alone, on captions
train stage1 --model_name_or_path "$work/untrained" --data_path "$work/data/stage1.json" --version plain \
    --tune_mm_mlp_adapter True --learning_rate 2e-3 --per_device_train_batch_size 16 --max_steps 250

# 2. projector and LoRA, on the mix of instructions
train stage2 --model_name_or_path "$work/stage1" --data_path "$work/data/stage2.json" --lora_r 8 --lora_alpha 16 \
    --lora_dropout 0 --learning_rate 1e-3 --mm_projector_lr 5e-4 --per_device_train_batch_size 12 --num_train_epochs 1
train stage2b --model_name_or_path "$work/stage1" --lora_weight_path "$work/stage2" --data_path "$work/data/stage2b.json" \
    --learning_rate 1e-3 --mm_projector_lr 5e-4 --per_device_train_batch_size 12 --group_by_modality_length True \
    --max_steps 1000
python scripts/pack_smol_llava.py base "$work/stage2b"

# 3. Fwd2Bot, on the same mixes
train fwd2bot-first "${method[@]}" "${nested[@]}" "${residual[@]}" "${answers[@]}" "${captions[@]}" --max_steps 300
train fwd2bot "${method[@]}" "${nested[@]}" "${residual[@]}" "${weights[@]}" "${captions[@]}" --max_steps 240 \
    --model_name_or_path "$work/fwd2bot-first" --data_path "$work/data/stage2b.json" --seed 1 \
    --learning_rate 6e-4 --summary_lr 5e-3 --warmup_steps 10
python scripts/pack_smol_llava.py fwd2bot "$work/fwd2bot"
