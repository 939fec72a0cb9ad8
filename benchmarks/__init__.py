"""Measurements against TRL and transformers, in process CPU seconds of one thread: a busy machine matters little."""

import os

# read when torch is imported; waiting threads would count as CPU time
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
