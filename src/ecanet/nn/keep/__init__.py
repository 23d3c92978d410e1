"""Patches other libraries that rebuild networks, or initialise what a file lacks, so that they keep gates.

A library is patched only if it is imported anyway, and only once there may be a gate to keep: each file says when.
"""

from ecanet.nn.keep import transformers, ultralytics

__all__ = ["transformers", "ultralytics"]
