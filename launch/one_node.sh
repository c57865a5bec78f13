#!/usr/bin/env bash
# Train on all accelerators of this machine, the batch split over them:
#
#     launch/one_node.sh --config=qwen2 model.path=models/qwen2 data.train=train.jsonl.gz
#
# What a user may want to change stands here.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"  # share of GPU memory JAX takes
exec "${PYTHON:-python}" -m comi_jax.train "$@"
