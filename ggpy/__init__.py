"""ggpy: convert, inspect and run GGUF language models on the CPU."""
