"""What the processes share: messages, sockets, configuration, supervision."""
