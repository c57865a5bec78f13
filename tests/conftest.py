"""Every test runs on four fake CPU devices (COMI_TEST_DEVICES), with JAX's silent conveniences turned into errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile much and compute little: without LLVM's optimisation passes they take half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_num_cpu_devices", int(os.environ.get("COMI_TEST_DEVICES", "4")))
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
