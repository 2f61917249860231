"""The command `engine`: a file for each group of commands."""
