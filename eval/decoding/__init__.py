"""Speculative decoding: drafters, proposals, the verifier's cache, acceptance."""
