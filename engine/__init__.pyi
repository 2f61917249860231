from .engine import Engine, Mode, Prefilter
from .query import Query
from .report import write_html, write_png
from .results import Hit, SearchResult

__all__ = ["Engine", "Hit", "Mode", "Prefilter", "Query", "SearchResult", "write_html", "write_png"]
