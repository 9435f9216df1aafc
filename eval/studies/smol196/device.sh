#!/usr/bin/env bash
# The study on a machine with a GPU and no network, in a few commands that go on from files. The parts of prepare.py are
# unpacked to $STUDY first:
#
#     mkdir -p /tmp/study && tar xf .pack/part-1.tar -C /tmp/study && bash /tmp/study/src/…/device.sh VERB …
#
#   start [NAME…]                 features in the background, and a probe of the speed in the foreground
#   base SECONDS STEPS            waits for the features, trains and measures the base
#   plan SECONDS WORKERS STEPS    WORKERS processes on the list below, its longer runs of STEPS steps
#   collect [--with-base]         results to $OUT
#
# Seconds are counted from the start of this script. From the environment: BATCH (128), EAGER=1 (nothing compiled), SPECS
# (in the place of the list).
set -uo pipefail
export STUDY=${STUDY:-/tmp/study} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTHONPATH=$STUDY/src TORCHINDUCTOR_CACHE_DIR=$STUDY/compiled PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
PYTHON=${PYTHON:-python3}
module() { "$PYTHON" -m "eval.studies.smol196.$@"; }
[ ! -d "$STUDY/src" ] || cd "$STUDY/src" # python -m looks in the current folder first
verb=$1
shift
case $verb in
start)
    OMP_NUM_THREADS=1 setsid nohup "$PYTHON" -m eval.studies.smol196.features --folder "$STUDY" \
        --processes "${PROCESSES:-14}" >"$STUDY/features.log" 2>&1 </dev/null &
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
    module probe --folder "$STUDY" "$@" 2>&1
    tail -n 3 "$STUDY/features.log"
    ;;
base)
    seconds=$1 steps=$2
    while [ ! -e "$STUDY/features.npy" ] && pgrep -f smol196.features >/dev/null; do sleep 1; done
    tail -n 1 "$STUDY/features.log"
    [ -e "$STUDY/features.npy" ] || module features --folder "$STUDY" --processes "${PROCESSES:-14}"
    module run base --folder "$STUDY" --seconds "$((seconds - SECONDS))" --steps "$steps" ${BATCH:+--batch $BATCH} 2>&1
    ;;
plan)
    seconds=$1 workers=$2 steps=$3
    # rates, on the tuning split; variants for both ends, of which the best is `winner`; then what decides, in its order
    specs=({pool,answer}:rate={5e-4,1e-3,2e-3},steps=60 kv:rate={1e-3,2e-3},steps=60
        {token,token-all,token-rebuild,fwd2bot}:rate=auto,steps=80
        dense:rate=5e-4 pool:rate=auto winner:rate=auto,keep=true fwd2bot:rate=auto residual:rate=auto kv:rate=auto
        query last answer:rate=auto average:rate=auto pool-distill:rate=auto residual-token:rate=auto
        downsample:rate=auto uniform:rate=auto residual-answer:rate=auto token-seeded:rate=auto apart:rate=auto
        rebuild:rate=auto distill:rate=auto shared:rate=auto random:rate=auto seeded:rate=auto)
    for ((i = 1; i <= workers; i++)); do
        module run work --folder "$STUDY" --seconds "$((seconds - SECONDS))" --steps "$steps" ${BATCH:+--batch $BATCH} \
            ${SPECS:-"${specs[@]}"} 2>&1 | sed "s/^/$i: /" &
        sleep 3 # the second finds the first one's claims
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
