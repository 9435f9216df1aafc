#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/install.sh" test
# the toy shapes are so small that a second thread only costs time
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest "$@"
