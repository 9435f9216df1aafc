#!/usr/bin/env bash
# Everything that wants a GPU, in nine minutes, from a machine that has torch, transformers and peft; installs nothing.
#   bash scripts/gpu_all.sh OUT_DIR [--minutes 9]                            one table OUT_DIR/gpu.md, and gpu.json, gpu.log
#   bash scripts/gpu_all.sh OUT_DIR --device cpu --shape tiny --quick        the same on a CPU, to try the script itself
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" "$root/scripts/gpu_all.py" "$@"
