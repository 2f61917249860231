"""Measurements of the engine; run as scripts or by `engine bench`."""
