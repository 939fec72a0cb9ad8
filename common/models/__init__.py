"""Vision-language models: files, architectures, and the embedded tiny one."""
