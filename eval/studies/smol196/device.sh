#!/usr/bin/env bash
# The study on a machine with a GPU and no network, in a few commands that go on from files. The parts of prepare.py are
# unpacked to $STUDY first:
#
#     mkdir -p /tmp/study && tar xf .pack/part-1.tar -C /tmp/study && bash /tmp/study/src/…/device.sh VERB …
#
#   start                         features in the background
#   base SECONDS STEPS            waits for the features and trains the base
#   plan SECONDS WORKERS [STEPS]  waits for the features; WORKERS processes on the rows of smol196.yaml, those that train
#                                 for STEPS steps instead of their own
#   collect [--with-base]         results to $OUT
#
# Seconds are counted from the start of this script. From the environment: BATCH (128), EAGER=1 (nothing compiled), ROWS
# (names, one a line, instead of all).
set -uo pipefail
export STUDY=${STUDY:-/tmp/study} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTHONPATH=$STUDY/src TORCHINDUCTOR_CACHE_DIR=$STUDY/compiled PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
PYTHON=${PYTHON:-python3}
module() { "$PYTHON" -m "eval.studies.smol196.$@"; }
features() {
    while [ ! -e "$STUDY/features.npy" ] && pgrep -f smol196.features >/dev/null; do sleep 1; done
    tail -n 1 "$STUDY/features.log"
    [ -e "$STUDY/features.npy" ] || module features --folder "$STUDY" --processes "${PROCESSES:-14}"
}
[ ! -d "$STUDY/src" ] || cd "$STUDY/src" # python -m looks in the current folder first
verb=$1
shift
case $verb in
start)
    OMP_NUM_THREADS=1 setsid nohup "$PYTHON" -m eval.studies.smol196.features --folder "$STUDY" \
        --processes "${PROCESSES:-14}" >"$STUDY/features.log" 2>&1 </dev/null &
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
    sleep 20
    tail -n 3 "$STUDY/features.log"
    ;;
base)
    seconds=$1 steps=$2
    features
    module run base --folder "$STUDY" --seconds "$((seconds - SECONDS))" --steps "$steps" ${BATCH:+--batch $BATCH} 2>&1
    ;;
plan)
    seconds=$1 workers=$2 steps=${3:-}
    features
    mapfile -t rows < <(printf '%s' "${ROWS:-}")
    for ((i = 1; i <= workers; i++)); do
        module run work --folder "$STUDY" --seconds "$((seconds - SECONDS))" ${steps:+--steps $steps} \
            ${BATCH:+--batch $BATCH} "${rows[@]}" 2>&1 | sed "s/^/$i: /" &
        sleep 3 # the second finds the first one's lock
    done
    wait
    ;;
collect)
    module run collect --folder "$STUDY" --output "${OUT:-$STUDY/collected}" "$@"
    cp "$STUDY/features.log" "${OUT:-$STUDY/collected}/" 2>/dev/null || true
    ls -l "${OUT:-$STUDY/collected}"
    ;;
*)
    echo "no such verb: $verb" >&2
    exit 2
    ;;
esac
