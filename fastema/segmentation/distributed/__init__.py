"""Several processes: the group, and the network replicated or sharded over it."""
