#!/usr/bin/env bash
# Train on all hosts of a TPU slice:   launch/tpu_pod.sh
#
# ---- edit here -------------------------------------------------------------------------------------------------------
NAME=comi                 # of an existing TPU VM (gcloud compute tpus tpu-vm create)
ZONE=us-east5-a
PROJECT=my-project
FOLDER=comi_jax           # a checkout of this repository on every host, with '.[tpu]' installed
COMMAND="--config=qwen2 model.path=/mnt/models/qwen2 data.train=/mnt/data/train.jsonl.gz train.output=/mnt/runs/qwen2"
# ----------------------------------------------------------------------------------------------------------------------
# The slice's metadata server gives each process its index. /mnt must be a file system that all hosts share. A restarted
# run resumes from its newest checkpoint.
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --project="$PROJECT" --worker=all \
    --command="cd $FOLDER && COMI_DISTRIBUTED=auto COMI_HEARTBEAT=${COMI_HEARTBEAT:-60} python -m comi_jax.train $COMMAND"
