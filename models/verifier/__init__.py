"""The verifier: its model, configuration, weights and processor."""
