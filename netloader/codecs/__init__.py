"""Codecs: control messages as frames, and tensors as the bytes of blocks."""
