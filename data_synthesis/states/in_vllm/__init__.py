"""What runs in vLLM's environment, where fledge is not installed: scripts that import nothing of it."""
