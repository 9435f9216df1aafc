#!/usr/bin/env bash
# One command on a fresh machine: installs, builds a small LLaVA, fine-tunes it with one extra flag, compresses, answers,
# searches, and prints a table. About ten minutes on two cores. Everything is under ./quickstart.
exec bash "$(dirname "$0")/train_easy_vqa.sh" --work quickstart "$@"
