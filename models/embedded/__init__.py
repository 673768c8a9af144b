"""A small verifier whose checkpoint, prompts, questions and training conversations are files of this package."""
