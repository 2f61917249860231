"""What answers, one or many, can be turned into where people work: tables, a picture, a notebook's output."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

    from tmm_engine.results import FailedQuery, SearchResult


class Exports:
    """Mixed into `SearchResult` and `SearchResults`, so that both have the same."""

    __slots__ = ()

    @abstractmethod
    def _answers(self) -> "Sequence[SearchResult | FailedQuery]":
        """What is exported."""

    @abstractmethod
    def to_arrow(self) -> "pyarrow.Table":
        """As a table with a row for every hit."""

    def to_pandas(self) -> "pandas.DataFrame":
        """As `to_arrow`.

        Raises:
            InputError: the 'pandas' extra is not installed.
        """
        from tmm_engine.views.table import as_pandas

        return as_pandas(self.to_arrow())

    def to_polars(self) -> "polars.DataFrame":
        """As `to_arrow`.

        Raises:
            InputError: the 'polars' extra is not installed.
        """
        from tmm_engine.views.table import as_polars

        return as_polars(self.to_arrow())

    def plot(self, *, columns: int = 10) -> Image.Image:
        """The sheet of queries and neighbours that `write_png` writes.

        Args:
            columns: Neighbours per line, at least 1.

        Raises:
            ImageError: An image has neither 1 nor 3 channels.
            InputError: As `write_png`.
        """
        from tmm_engine.views.picture import draw_sheet

        return draw_sheet(self._answers(), columns=columns)

    def _repr_html_(self) -> str:
        """In a notebook: queries and neighbours as pictures."""
        from tmm_engine.views.notebook import notebook_html

        return notebook_html(self._answers())
