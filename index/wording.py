"""How messages list many names."""

from collections.abc import Iterable

NAMED = 5  # that a message lists, where nothing else is said


def some(names: Iterable[object], limit: int = NAMED) -> str:
    """The first few, and how many more there are, as in ``a, b and 3 more``."""
    texts = [*map(str, names)]
    rest = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + rest
