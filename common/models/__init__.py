"""Vision-language models: checkpoints, architectures, and the embedded tiny one."""
