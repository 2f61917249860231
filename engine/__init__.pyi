from .building import build_index
from .engine import Engine, Mode, Prefilter
from .living import Version
from .query import Query
from .report import write_html, write_png
from .results import FailedQuery, Hit, SearchResult

__all__ = [
    "Engine",
    "FailedQuery",
    "Hit",
    "Mode",
    "Prefilter",
    "Query",
    "SearchResult",
    "Version",
    "build_index",
    "write_html",
    "write_png",
]
