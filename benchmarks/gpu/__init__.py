"""What the Triton kernels, the tail and whole networks cost on a GPU: ``python -m benchmarks.gpu --help``."""
