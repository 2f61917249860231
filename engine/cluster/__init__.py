"""Several machines, by Ray: connecting to them, workers that are replaced, building and searching with them."""
