"""Loading a model: pulled from a source, or read by the default loader."""
