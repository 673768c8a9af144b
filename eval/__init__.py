"""Acceptance length by speculative decoding, and its report."""
