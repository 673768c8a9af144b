"""The verifier reads tokens, and its hidden states are recorded."""
