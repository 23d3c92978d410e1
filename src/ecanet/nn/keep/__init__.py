"""Libraries that build networks anew, or fill in what a file lacks, are taught to keep gates.

Nothing is imported of a library that is not there already, and none is changed before there is a gate to keep: see each
file for when.
"""

from ecanet.nn.keep import transformers, ultralytics

__all__ = ["transformers", "ultralytics"]
