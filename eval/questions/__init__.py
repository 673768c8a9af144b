"""Questions that are asked: read from files and sets, rendered, and at several context lengths."""
