"""What training measures of itself, and where that goes."""
