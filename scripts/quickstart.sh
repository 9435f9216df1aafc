#!/usr/bin/env bash
# One command on a fresh machine: installs, puts a small LLaVA of real parts together, compresses photographs, answers and
# searches from their summaries, and fine-tunes with one extra flag. A few minutes on two cores. Everything is under ./quickstart.
set -euo pipefail
. "$(dirname "$0")/install.sh" quickstart
# waiting threads that spin would steal the core of whatever else runs here
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
python scripts/smol_quickstart.py "$@"
