"""The verifier answers prompts, in this process or through servers."""
