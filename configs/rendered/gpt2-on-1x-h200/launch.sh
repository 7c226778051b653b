#!/bin/sh
set -eu
exec accelerate launch --config_file runs/gpt2/accelerate.yaml -m launcher.worker runs/gpt2
