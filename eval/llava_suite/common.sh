# Sourced by the benchmark scripts beside it, which are run from the root of a LLaVA checkout, as LLaVA's own are:
#
#     bash /path/to/eval/llava_suite/pope.sh MODEL [--k 8] [more arguments of the LLaVA program]
#
# MODEL is a Fwd2Bot checkpoint or any LLaVA. Data lies where LLaVA's Evaluation.md puts it, under $DATA; answers go
# where its scorers look for them, under the name of the model, with "-kK" where --k is given. With several GPUs in
# CUDA_VISIBLE_DEVICES the questions are shared among them.
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
model=$1
shift
more=("$@")
DATA=${DATA:-./playground/data/eval}
CONV=${CONV:-vicuna_v1}
name=$(basename "$model")
for ((i = 0; i < $#; i++)); do
    case ${more[i]} in
        --k) name=$name-k${more[i + 1]} ;;
        --k=*) name=$name-k${more[i]#--k=} ;;
    esac
done

run() { # MODULE ANSWERS ARGUMENTS…: one of LLaVA's programs on one GPU
    local module=$1 answers=$2
    shift 2
    fwd2bot llava eval "$module" --model-path "$model" --answers-file "$answers" --temperature 0 --conv-mode "$CONV" \
        "$@" "${more[@]}"
}

run_sharded() { # MODULE ANSWERS ARGUMENTS…: the same on all GPUs; the parts are put together in ANSWERS
    local module=$1 answers=$2 gpus chunk parts=() jobs=()
    shift 2
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-0}"
    for chunk in "${!gpus[@]}"; do
        parts+=("${answers%.jsonl}.${#gpus[@]}_$chunk.jsonl")
        CUDA_VISIBLE_DEVICES=${gpus[chunk]} run "$module" "${parts[chunk]}" "$@" \
            --num-chunks "${#gpus[@]}" --chunk-idx "$chunk" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done # one that failed ends the script
    cat "${parts[@]}" >"$answers.part" && mv "$answers.part" "$answers"
}
