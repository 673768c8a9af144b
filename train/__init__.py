"""Training of the draft head: the TTT loss, packed batches, DeepSpeed, checkpoints, metrics."""
