"""What several transports share: worker threads, sockets, system calls, and the state of a channel."""
