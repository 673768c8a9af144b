"""The TTT loss: rows, unroll, and the losses of all steps in one pass."""
