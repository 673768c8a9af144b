"""Head checkpoints: fledge's own, Speculators', and those that others publish."""
