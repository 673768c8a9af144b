"""The verifier, the draft head, its vocabulary and its checkpoint format."""
