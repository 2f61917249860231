from .building import build_index
from .engine import Engine
from .options import Mode, Prefilter, SearchOptions
from .query import Query
from .results import FailedQuery, Hit, SearchResult
from .versions import Version
from .views.page import write_html
from .views.picture import write_png

__all__ = [
    "Engine",
    "FailedQuery",
    "Hit",
    "Mode",
    "Prefilter",
    "Query",
    "SearchOptions",
    "SearchResult",
    "Version",
    "build_index",
    "write_html",
    "write_png",
]
