"""How good a model file is: perplexity, divergence from a better file, quantization error, importance of columns.

Nothing is imported here, so that each part costs only what it needs.
"""
