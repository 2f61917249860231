"""Faults that are planted into a data set, so that it is known what an audit should find."""
