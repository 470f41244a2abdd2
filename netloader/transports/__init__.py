"""Data paths between peers: the contract, the registry, and the transports themselves."""
