"""What the server answers to, a file for each group of addresses."""
