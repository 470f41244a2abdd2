"""What a worker offers of its model, and the server that offers it."""
