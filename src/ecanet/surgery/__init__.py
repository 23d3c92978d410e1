"""Put gates into a network that somebody else wrote, swap them, remove them, and give its blocks the fused tail."""

from ecanet.surgery.find.blocks import BLOCKS
from ecanet.surgery.find.layers import ATTENTION
from ecanet.surgery.fuse import FUSED, fuse_tails_
from ecanet.surgery.insert import insert_gates_
from ecanet.surgery.insertion_file import Insertion, load, save
from ecanet.surgery.remove import remove_gates_
from ecanet.surgery.replace import replace_gates_
from ecanet.surgery.report import Report, Row

__all__ = [
    "ATTENTION",
    "BLOCKS",
    "FUSED",
    "Insertion",
    "Report",
    "Row",
    "fuse_tails_",
    "insert_gates_",
    "load",
    "remove_gates_",
    "replace_gates_",
    "save",
]
