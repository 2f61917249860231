"""Descriptors that hold under noise: layers between input and head, over symmetric views, measured on the index's own
images."""
