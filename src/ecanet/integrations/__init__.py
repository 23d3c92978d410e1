"""Bridges to libraries that bring their own way of writing networks. Nothing here is imported by the rest of ecanet."""
