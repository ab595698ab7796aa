#!/usr/bin/env bash
# Train: ./run_train.sh [CONFIG] [--section.key=value ...], by default configs/xihe_debug.toml.
#
# Finds or makes an environment (environment.sh), prepares the data and trains on every GPU of this machine. Running it
# again resumes from the newest checkpoint. NGPU, NNODES, NODE_RANK and RDZV_ENDPOINT choose the processes:
# ./run_train.sh --help explains them. Variables in .env (WANDB_API_KEY, HF_TOKEN) are read. Works from any directory;
# paths, those in configs too, are relative to the working directory. Exit code 0: the run is finished, or was stopped by
# a signal and saved; 1: a mistake, explained in one line.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
config=""
for argument in "$@"; do
    case $argument in
    --help | -h) print_help launch ;;
    --*) ;;
    *.toml) config=$argument ;; # may stand behind `--section.key value`
    esac
done
environment

case ${config:-${1:-}} in
"" | --*) set -- "$root/configs/xihe_debug.toml" "$@" ;;
esac
trap '' INT # until the first line of torchxihe handles it: Ctrl-C while Python itself starts is a traceback
exec "$PYTHON" -m torchxihe launch "$@"
