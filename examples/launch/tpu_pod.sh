#!/bin/bash
# Starts all hosts of a Cloud TPU slice from your own machine: tpu_pod.sh NAME ZONE FOLDER
# The hosts find each other. Each has lora-jax in ~/lora-jax. FOLDER is shared by all hosts, such as
# a Filestore or Cloud Storage FUSE mount. To continue after exit code 75, run it again.
set -eu
name=$1 zone=$2 out=$3
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  cd ~/lora-jax
  test -e $out/run.json && resume=--resume
  python scripts/train.py --model huggyllama/llama-7b --quant int4 --dataset my.jsonl \\
    --batch-size 16 --output-dir $out \$resume"
