from .building import build_index
from .engine import Engine
from .living import Version
from .query import Query
from .request import Mode, Prefilter
from .results import FailedQuery, Hit, SearchResult
from .views.report import write_html, write_png

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
