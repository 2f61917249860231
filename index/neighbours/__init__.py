"""Nearest neighbours over a column of features, by FAISS."""
