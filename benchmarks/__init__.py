"""Benchmarks against TRL and transformers, in CPU seconds of one thread, which a busy machine distorts little."""

import os

# Set before torch is imported, which reads them. PASSIVE, because waiting threads would count as CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
