"""What both sides of a session share: the driver of its state machine, the connection, and the queues between."""
