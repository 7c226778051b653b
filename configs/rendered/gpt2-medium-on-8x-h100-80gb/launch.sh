#!/bin/sh
set -eu
exec accelerate launch --config_file runs/gpt2-medium/accelerate.yaml -m launcher.worker runs/gpt2-medium
