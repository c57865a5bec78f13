#!/usr/bin/env bash
# Train on all accelerators of this machine, with each batch split over them:
#
#     launch/one_node.sh --config=qwen2 model.path=models/qwen2 data.train=train.jsonl.gz
#
# Settings that you may want to change:
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"  # fraction of GPU memory for JAX
exec "${PYTHON:-python}" -m comi_jax.train "$@"
