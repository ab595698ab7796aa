#!/usr/bin/env bash
# Train: ./run_train.sh [CONFIG] [--section.key=value ...], by default configs/xihe_debug.toml.
#
# Finds or makes an environment (environment.sh), prepares the data and trains on every GPU of this machine; run again,
# it goes on from the newest checkpoint. NGPU, NNODES, NODE_RANK and RDZV_ENDPOINT say where to run:
# ./run_train.sh --help explains them. Variables in .env (WANDB_API_KEY, HF_TOKEN) are read. Works from any directory;
# paths, those in configs too, are relative to the one it is started from. Exit code 0: the run is finished, or was
# stopped by a signal and saved; 1: a mistake, explained in a line.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment

case ${1:-} in
"") set -- "$root/configs/xihe_debug.toml" ;;
--help | -h) ;;
--*) set -- "$root/configs/xihe_debug.toml" "$@" ;;
esac
exec "$PYTHON" -m torchxihe launch "$@"
