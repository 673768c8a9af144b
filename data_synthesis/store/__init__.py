"""The hidden-state store: shards, reading, writing, number formats, draft vocabulary."""
