"""What happens to a live engine: sleep, reload, updates in place."""
