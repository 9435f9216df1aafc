#!/usr/bin/env bash
# One command on a fresh machine: installs, builds a small LLaVA, fine-tunes it with one extra flag, compresses, answers,
# searches, and prints a table. About ten minutes on two cores. Everything is under ./easy-vqa.
set -euo pipefail
. "$(dirname "$0")/install.sh" easy-vqa
# waiting threads that spin would steal the core of whatever else runs here
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
python scripts/train_easy_vqa.py "$@"
