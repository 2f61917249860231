"""Measuring `engine serve`: what HTTP costs, what holds under load, under hostile requests, and after a kill."""
