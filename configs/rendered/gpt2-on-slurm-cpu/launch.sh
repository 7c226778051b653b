#!/bin/sh
set -eu
# usage: launch.sh NODE HOST PORT, on each node: NODE from 0 to 1, HOST is node 0
[ $# -eq 3 ] || { echo "usage: launch.sh NODE HOST PORT, on each node: NODE from 0 to 1, HOST is node 0" >&2; exit 2; }
exec accelerate launch --machine_rank "$1" --main_process_ip "$2" --main_process_port "$3" --config_file runs/gpt2/accelerate.yaml -m launcher.worker runs/gpt2
