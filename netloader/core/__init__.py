"""What can be said and decided without any I/O: the standard library and msgspec, nothing else."""
