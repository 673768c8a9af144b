"""Training data: stores mixed, packed and read."""
