"""Watching a transfer: how far it is."""
