"""Exemplars and features: what is stored, and how it is found. Names are imported when they are first used."""

import os

import lazy_loader as lazy

os.environ.setdefault("LANCE_LOG", "error")  # Lance reads it when it is imported; it would warn of every new dataset

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
