"""Evaluation of a head in a running server."""
