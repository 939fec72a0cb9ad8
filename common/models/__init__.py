"""Vision-language models: files, architectures, adapters, and the tiny models that ship with the code."""
