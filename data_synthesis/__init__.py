"""From prompts to conversations, and from conversations to hidden states."""
