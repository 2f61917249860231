"""A column of features as one matrix for products with queries; read once, and mapped from where it is kept.

On disk it is a cache: it can be rebuilt, and what is not exactly what was written for this very content is ignored.
A store reads rows by the hundred thousand as fast, but a few of them, as every search does, a hundred times slower.
"""

import contextlib
import hashlib
import json
import mmap
import shutil
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from tmm_engine.index.files import replacing
from tmm_engine.index.neighbours.budget import BLOCK, Budget, Lease
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.vectors import SCAN
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.index.types import Rows

ALIGNED = max(1024, mmap.PAGESIZE // 4)  # rows: so many floats are whole pages
FEW = 32  # queries
SPARE = 256 << 20  # bytes that a cache leaves free on its disk
PART = 512  # rows
SMALLEST, LARGEST = 1e-30, 1e30  # norms of rows whose products with a unit vector stay well within float32


@dataclass(frozen=True, slots=True, eq=False)
class Norms:
    """What turns products with queries into scores, as float32.

    Attributes:
        inverses: 1 / |x|; 0 for 0, NaN for what float32 cannot say.
        halves: |x|² / 2.
    """

    inverses: Float32[np.ndarray, "n"]
    halves: Float32[np.ndarray, "n"]

    @classmethod
    def of(cls, norms: Float64[np.ndarray, "n"]) -> "Norms":
        """Of rows of these lengths."""
        said = (norms >= SMALLEST) & (norms <= LARGEST)
        inverses = np.divide(1.0, norms, out=np.full(len(norms), np.nan), where=said)
        inverses[norms == 0] = 0
        with np.errstate(over="ignore"):
            return cls(inverses.astype(np.float32), (norms**2 / 2).astype(np.float32))

    def part(self, start: int, stop: int) -> "Norms":
        """Of some rows side by side."""
        return Norms(self.inverses[start:stop], self.halves[start:stop])

    def scores(self, products: Float32[np.ndarray, "q rows"], metric: Metric) -> Float32[np.ndarray, "q rows"]:
        """In place: in the order of L2 distance or cosine; NaN or infinite for what float32 cannot say."""
        with np.errstate(invalid="ignore", over="ignore"):
            if metric is Metric.L2:
                products -= self.halves
            else:
                products *= self.inverses
        return products


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Matrix:
    """Features of all rows.

    Attributes:
        values: Of all rows in order.
        norms: Of them.
        lease: Of memory, where they are mapped.
    """

    values: Float32[np.ndarray, "n d"]
    norms: Norms
    _map: mmap.mmap | None = field(default=None, repr=False)
    lease: Lease | None = field(default=None, repr=False)

    @classmethod
    def of(cls, parts: Iterable[Float32[np.ndarray, "_ d"]], *, rows: int, dimension: int) -> "Matrix":
        """In memory."""
        values = np.empty((rows, dimension), np.float32)
        start = 0
        for part in parts:
            values[start : start + len(part)] = part
            start += len(part)
        return cls(values, Norms.of(norms_of(values)))

    @classmethod
    def mapped(cls, file: mmap.mmap, lease: Lease, *, rows: int, dimension: int) -> "Matrix":
        """From a file of these values, and then of the norms in float64; it lets go of pages when the lease shrinks."""
        size = 4 * rows * dimension
        values = np.frombuffer(file, np.float32, rows * dimension).reshape(rows, dimension)
        matrix = cls(values, Norms.of(np.frombuffer(file[size : size + 8 * rows], np.float64)), file, lease)
        own = weakref.ref(matrix)
        lease.shrunk = lambda: None if (alive := own()) is None else alive.let_go()
        return matrix

    @property
    def stays(self) -> int:
        """How many rows, the first, may stay in memory; pages of others are let go of after each use."""
        n, d = self.values.shape
        if self.lease is None or self.lease.size >= 4 * n * d:
            return n
        return self.lease.size // (4 * d) // ALIGNED * ALIGNED

    def let_go(self) -> None:
        """Of what may not stay."""
        self._let_go(self.stays, len(self.values))

    def among(self, rows: Rows) -> "Chosen":
        """Some rows, ascending."""
        return Chosen(self, rows)

    def take(self, rows: Rows) -> Float32[np.ndarray, "rows d"]:
        """Some rows, in the order given; a copy."""
        taken = self.values[rows]
        self.let_go()
        return taken

    def nearest(self, xq: Float32[np.ndarray, "q d"], *, fetch: int, metric: Metric) -> Int64[np.ndarray, "q found"]:
        """For each query at least min(fetch, n) rows that are the nearest but for rounding.

        −1 stands where a distance is infinite. Where the matrix stays in memory, one query is one product.

        Args:
            xq: Of unit length for cosine.
            fetch: How many.
            metric: What makes a row near.
        """
        return _nearest(self._blocks(len(xq)), xq, fetch=fetch, metric=metric)

    def _blocks(self, queries: int) -> Iterator[tuple[Float32[np.ndarray, "rows d"], Norms, int]]:
        n, d = self.values.shape
        scores = max(ALIGNED, BLOCK // (4 * max(1, queries)) // ALIGNED * ALIGNED)  # rows whose scores are a block
        rows = max(ALIGNED, BLOCK // (4 * d) // ALIGNED * ALIGNED)
        start, stays = 0, self.stays
        while start < n:
            stop = min(start + scores, stays) if start < stays else min(start + min(scores, rows), n)
            yield self.values[start:stop], self.norms.part(start, stop), start
            if start >= stays:
                self._let_go(start, stop)
            start = stop

    def _let_go(self, start: int, stop: int) -> None:
        if start < stop and self._map is not None and hasattr(self._map, "madvise"):
            row = 4 * self.values.shape[1]
            self._map.madvise(mmap.MADV_DONTNEED, start * row, (stop - start) * row)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Some rows of a matrix: row i here is row `rows[i]` there; gathered for each search, so that nothing is held.

    Attributes:
        matrix: Of all rows.
        rows: Ascending.
    """

    matrix: Matrix
    rows: Rows

    def among(self, rows: Rows) -> "Chosen":
        """Some of them, ascending."""
        return Chosen(self.matrix, self.rows[rows])

    def take(self, rows: Rows) -> Float32[np.ndarray, "rows d"]:
        """Some rows, in the order given; a copy."""
        return self.matrix.take(self.rows[rows])

    def nearest(self, xq: Float32[np.ndarray, "q d"], *, fetch: int, metric: Metric) -> Int64[np.ndarray, "q found"]:
        """As `Matrix.nearest`."""
        return _nearest(self._blocks(len(xq)), xq, fetch=fetch, metric=metric)

    def _blocks(self, queries: int) -> Iterator[tuple[Float32[np.ndarray, "rows d"], Norms, int]]:
        step = max(ALIGNED, BLOCK // (4 * max(queries, self.matrix.values.shape[1])))
        for start in range(0, len(self.rows), step):
            rows = self.rows[start : start + step]
            norms = Norms(self.matrix.norms.inverses[rows], self.matrix.norms.halves[rows])
            yield self.matrix.take(rows), norms, start


@dataclass(frozen=True, slots=True, eq=False)
class Streamed:
    """A column, or some rows of it, that neither fits into memory nor can be kept: the store is read by every search.

    Attributes:
        store: That has the column.
        column: Its name.
        rows: Ascending; None: all.
    """

    store: ExemplarStore
    column: str
    rows: Rows | None = None

    def among(self, rows: Rows) -> "Streamed":
        """Some of them, ascending."""
        return Streamed(self.store, self.column, rows if self.rows is None else self.rows[rows])

    def take(self, rows: Rows) -> Float32[np.ndarray, "rows d"]:
        """Some rows, in the order given; a copy."""
        wanted = rows if self.rows is None else self.rows[rows]
        return self.store.features(wanted, column=self.column).copy()  # a store's may be read-only

    def nearest(self, xq: Float32[np.ndarray, "q d"], *, fetch: int, metric: Metric) -> Int64[np.ndarray, "q found"]:
        """As `Matrix.nearest`."""
        return _nearest(self._blocks(len(xq)), xq, fetch=fetch, metric=metric)

    def _blocks(self, queries: int) -> Iterator[tuple[Float32[np.ndarray, "rows d"], Norms, int]]:
        start = 0
        for values in self._parts(min(SCAN, max(ALIGNED, BLOCK // (4 * max(1, queries))))):
            yield values, Norms.of(norms_of(values)), start
            start += len(values)

    def _parts(self, step: int) -> Iterator[Float32[np.ndarray, "rows d"]]:
        if self.rows is None:
            yield from (part.copy() for part in self.store.scan_features(step, column=self.column))
        else:
            for start in range(0, len(self.rows), step):
                yield self.take(np.arange(start, min(start + step, len(self.rows))))


def _nearest(
    blocks: Iterable[tuple[Float32[np.ndarray, "rows d"], Norms, int]],
    xq: Float32[np.ndarray, "q d"],
    *,
    fetch: int,
    metric: Metric,
) -> Int64[np.ndarray, "q found"]:
    """The best of the first block, of these and of the next the best, and so on.

    One product is all that several threads work on: beside other work each such step waits for the slowest of them.
    """
    queries = torch.from_numpy(np.require(xq, requirements=("C", "W")))
    found: tuple[Tensor, Tensor] | None = None
    space = torch.empty(0)  # for products: fresh memory for every block would cost a quarter of the time
    for block, norms, start in blocks:
        values = torch.from_numpy(block)
        if len(queries) > FEW and len(space) < len(values) * len(queries):
            space = torch.empty(len(values) * len(queries))
        best, places = _best(norms.scores(_products(values, queries, space).numpy(), metric), fetch)
        found = (best, places + start) if found is None else _merged(found, (best, places + start), fetch)
    assert found is not None, "a matrix has rows"
    values, rows = found
    rows[values == -torch.inf] = -1
    return rows.numpy()


def _products(
    values: Float32[Tensor, "rows d"], queries: Float32[Tensor, "q d"], space: Float32[Tensor, "_"]
) -> Float32[Tensor, "q rows"]:
    """Of every row with every query, perhaps in a space for as many.

    MKL multiplies with one vector in one thread, with two in all of them: one query goes twice. With few, a matrix
    beyond the processor's cache is read up to seven times as fast from this side as from the other; with many, a part
    at a time that stays in the cache.
    """
    if len(queries) > FEW:
        products = space[: len(queries) * len(values)].view(len(queries), len(values))
        for start in range(0, len(values), PART):
            part = slice(start, start + PART)
            torch.mm(queries, values[part].T, out=products[:, part])
        return products
    together = values @ (queries if len(queries) > 1 else queries.repeat(2, 1)).T
    return together[:, : len(queries)].T.contiguous()


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], fetch: int) -> tuple[Tensor, Tensor]:
    """The best of two, and their rows."""
    values, rows = (torch.cat(both, dim=1) for both in zip(one, other, strict=True))
    best, places = _best(values.numpy(), fetch)
    return best, rows.gather(1, places)


def _best(scores: Float32[np.ndarray, "q rows"], fetch: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row and their places; beside as many as are wanted, all that are NaN or infinite."""
    values, places = torch.from_numpy(scores).topk(min(fetch, scores.shape[1]), dim=1)
    if bool(values[:, 0].isfinite().all()):  # NaN is before all numbers
        return values, places
    scores[np.isnan(scores)] = np.inf
    unsaid = int(np.isposinf(scores).sum(1).max())
    values, places = torch.from_numpy(scores).topk(min(fetch + unsaid, scores.shape[1]), dim=1)
    return values, places


def norms_of(values: Float32[np.ndarray, "n d"]) -> Float64[np.ndarray, "n"]:
    """In float64, whose squares neither vanish nor overflow."""
    return np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))


@dataclass(frozen=True, slots=True, eq=False)
class MatrixCache:
    """Files of one version of an index: the values of all rows, then their norms.

    Attributes:
        folder: Where they are; made when it is needed.
        content: A digest of the exemplars that they are made of.
        budget: Of memory.
    """

    folder: Path
    content: str
    budget: Budget = field(default_factory=Budget)

    def load(self, column: str, *, rows: int, dimension: int) -> Matrix | None:
        """The matrix of a column; None if there is none, or it is of other content, or damaged."""
        path = self._path(column)
        size = 4 * rows * dimension
        try:
            about = json.loads(_about(path).read_text(encoding="utf-8"))
            with path.open("rb") as file:
                expected = (column, self.content, rows, dimension)
                if tuple(about[name] for name in ("column", "content", "rows", "dimension")) != expected:
                    return None
                if hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]:
                    return None
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants what could be written to
            if len(mapped) != size + 8 * rows:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Matrix.mapped(mapped, self.budget.lend(size), rows=rows, dimension=dimension)

    def save(self, column: str, parts: Iterable[Float32[np.ndarray, "_ d"]], *, size: int) -> None:
        """Keep a column of so many bytes; where it cannot be written, or would fill the disk, searches do without."""
        path = self._path(column)
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            if shutil.disk_usage(self.folder).free < size + SPARE:
                return
            digest, norms, dimension = hashlib.sha256(), [np.empty(0)], 0
            with replacing(_about(path)) as about, replacing(path) as written:
                with written.open("wb") as file:
                    for part in parts:
                        content = np.ascontiguousarray(part)
                        file.write(content.data)
                        digest.update(content.data)
                        norms.append(norms_of(content))
                        dimension = content.shape[1]
                    every = np.concatenate(norms)
                    file.write(every.data)
                    digest.update(every.data)
                described = {"column": column, "content": self.content, "rows": len(every), "dimension": dimension}
                about.write_text(json.dumps(described | {"sha256": digest.hexdigest()}), encoding="utf-8")

    def check(self, exemplars: int) -> list[Path]:
        """The files that are damaged, or not of so many exemplars; those of other versions are whole if they say so."""
        return [path for path in sorted(self.folder.glob("*.f32")) if not self._is_whole(path, exemplars)]

    def _is_whole(self, path: Path, exemplars: int) -> bool:
        try:
            about = json.loads(_about(path).read_text(encoding="utf-8"))
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]:
                    return False
            return about["content"] != self.content or bool(about["rows"] == exemplars)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _path(self, column: str) -> Path:
        return self.folder / f"{column}.f32"


def _about(path: Path) -> Path:
    return path.with_name(path.name + ".json")
