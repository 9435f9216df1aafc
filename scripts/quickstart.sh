#!/usr/bin/env bash
# One command on a fresh machine: installs, puts smol-llava together, compresses real photographs, answers and searches
# from the summaries alone, fine-tunes with the one extra flag, and prints a table. Under ten minutes on two cores.
# Everything is under ./quickstart. With --data DATA, a folder that holds flickr8k/, it takes those photographs.
set -euo pipefail
. "$(dirname "$0")/install.sh" quickstart
# waiting threads that spin would steal the core of whatever else runs here
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
python scripts/quickstart.py "$@"
