"""Exemplars and their features, on disk (Lance) and in memory; how an index is built, changed and committed."""
