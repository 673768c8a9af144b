"""Jobs: rendered, queued, recorded, and run on their nodes."""
