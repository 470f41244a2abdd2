"""Code that client and server sessions share: the driver of the state machine, the control connection, queues."""
