"""How things are laid out on the wire: control messages into frames, tensors into block bytes."""
