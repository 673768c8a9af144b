"""The processes of a training run."""
