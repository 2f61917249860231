"""Classes by neighbours, with a measure of doubt: conformal prediction over an index."""
