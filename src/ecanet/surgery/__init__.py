"""Put gates into a network somebody else wrote, swap them, take them out, and give its blocks the fused tail."""

from ecanet.surgery.insert import insert_gates_
from ecanet.surgery.report import Report, Row

__all__ = ["Report", "Row", "insert_gates_"]
