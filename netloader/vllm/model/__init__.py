"""What one rank's model is: its identity, its raw tensors, and what the ranks agree on."""
