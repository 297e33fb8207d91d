"""Several processes: sharded tensors, and ranks that share a batch."""
