"""From rows of chat data to the prompts of a run."""
