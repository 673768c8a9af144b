"""The draft head: its sizes, network, attention and vocabulary."""
