"""FAISS factory strings: which are taken, what they need, and how thoroughly an approximate index is searched."""

import re
from dataclasses import dataclass
from enum import StrEnum

import faiss

from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.store.where import shortened

EXACT = "Flat"
HALF = "SQfp16"
SQ_STEP = 16
LARGEST_HALF = 65504.0
# FAISS ends the process, or does not come back, for strings such as HNSW0, PQ0 or NSG1: these forms are safe.
FACTORIES = re.compile(
    r"(IVF(?P<lists>[1-9]\d{0,5}),)?(Flat|SQ[468]|SQfp16|PQ(?P<codes>[1-9]\d{0,3}))"
    r"|HNSW([2-9]|[1-9]\d{1,2})(,(Flat|SQ8|SQfp16|PQ(?P<graph_codes>[1-9]\d{0,3})))?"
)
CODES = 256  # centroids of a product quantizer, each of which needs an exemplar to train on
RERANK = 4  # candidates of an approximate search, for each neighbour wanted, that are scored exactly
MOST_RERANKED = 1000  # beyond the neighbours wanted


class SearchPrecision(StrEnum):
    """Of the numbers that are looked at for every exemplar; the best are scored again in fp32."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    @property
    def factory(self) -> str:
        """FAISS's name for looking at all exemplars so."""
        return {"fp32": EXACT, "fp16": HALF, "int8": "SQ8"}[self]


@dataclass(frozen=True, slots=True)
class Effort:
    """How thoroughly an approximate index is searched.

    Attributes:
        ef_search: Of HNSW: how many candidates its walk keeps. None: FAISS's default, or as many as are fetched.
        nprobe: Of IVF: how many clusters are looked into. None: the square root of their number.
        rerank: Candidates scored exactly for each neighbour wanted, at least 1.
    """

    ef_search: int | None = None
    nprobe: int | None = None
    rerank: int = RERANK

    def fetched(self, k: int) -> int:
        """How many candidates are scored exactly for k neighbours."""
        return min(self.rerank * k, k + MOST_RERANKED)


def make_faiss_index(d: int, metric: Metric, factory: str) -> faiss.Index:
    """An empty FAISS index; for cosine an inner-product index that expects normalised features.

    Raises:
        InputError: FAISS does not know the factory string.
    """
    kind = faiss.METRIC_INNER_PRODUCT if metric is Metric.COSINE else faiss.METRIC_L2
    if not FACTORIES.fullmatch(factory):
        raise InputError(
            f"expected a FAISS factory string for features of {d} dimensions such as {EXACT!r} (exact), 'HNSW32', "
            f"'IVF256,Flat' or 'IVF256,PQ16', got {shortened(factory)}"
        )
    try:
        return faiss.index_factory(d, factory, kind)
    except RuntimeError as error:
        raise InputError(
            f"FAISS cannot make an index of {factory!r} for features of {d} dimensions: {reason(error)}; "
            f"try {EXACT!r} (exact), 'HNSW32' or 'IVF256,Flat'"
        ) from None


def fitting_dimension(d: int, factory: str) -> int:
    """d, or what features are filled up to with zeros, which change no distance.

    PQ cuts them into codes; of SQ FAISS compares 16 numbers at once, or else, fifteen times as slowly, one by one.
    """
    found = FACTORIES.fullmatch(factory)
    codes = 1 if found is None else int(found["codes"] or found["graph_codes"] or 1)
    multiple = SQ_STEP if "SQ" in factory else codes
    return -(-d // multiple) * multiple


def trained_on(factory: str) -> int:
    """How many exemplars its clusters and codes need at least; 0 where there are none, or FAISS does not know it."""
    found = FACTORIES.fullmatch(factory)
    if found is None:
        return 0
    return max(int(found["lists"] or 0), CODES if found["codes"] or found["graph_codes"] else 0)


def usable(factory: str, exemplars: int) -> str:
    """The factory string, or exact search where so few exemplars, as after deletions, cannot train it."""
    return factory if exemplars >= trained_on(factory) else EXACT


def check_trainable(factory: str, exemplars: int) -> None:
    """Refuse clusters and codes that so few exemplars cannot train; the form of the string is not looked at.

    Raises:
        InputError: too few.
    """
    needed = trained_on(factory)
    if exemplars < needed:
        raise InputError(
            f"FAISS cannot use {factory!r} for {exemplars:,} exemplars: it needs {needed:,} or more to train on; use "
            f"fewer clusters, 'HNSW32', or {EXACT!r} (exact)"
        )


def reason(error: RuntimeError) -> str:
    """What FAISS says, without where in its source."""
    return str(error).rsplit("Error: ", 1)[-1].splitlines()[0].strip()
