"""A small verifier with its own corpus, made on this machine."""
