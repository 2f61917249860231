from .auditing.findings import Audit, Evidence, Finding, Kind, Known, Rule
from .auditing.writing import write_audit
from .building import build_index
from .classifying.calibration import Calibration
from .classifying.classification import Candidate, Classification, Classifications
from .cluster.connection import RayOptions
from .engine import Engine
from .options import Mode, Prefilter, SearchOptions
from .query import Query
from .results import Explanation, FailedQuery, Hit, SearchResult, SearchResults
from .verify import repair_index, verify_index
from .versions import Version
from .views.page import write_html
from .views.picture import write_png
from .views.table import write_parquet

__version__: str

__all__ = [
    "Audit",
    "Calibration",
    "Candidate",
    "Classification",
    "Classifications",
    "Engine",
    "Evidence",
    "Explanation",
    "FailedQuery",
    "Finding",
    "Hit",
    "Kind",
    "Known",
    "Mode",
    "Prefilter",
    "Query",
    "RayOptions",
    "Rule",
    "SearchOptions",
    "SearchResult",
    "SearchResults",
    "Version",
    "build_index",
    "repair_index",
    "verify_index",
    "write_audit",
    "write_html",
    "write_parquet",
    "write_png",
]
