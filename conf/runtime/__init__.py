"""What every stage shares while it runs: artifacts, journals, progress, signals, ranks."""
