"""Data types and decisions without any I/O. Imports the standard library and msgspec only."""
