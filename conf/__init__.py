"""Configuration, the command line, and what every stage shares: artifacts, journals, progress."""
