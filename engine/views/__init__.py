"""Search results to look at."""
