"""Labels of a table or of arrays as numbers: integers are, names get the place that they have in order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tmm_engine.index.errors import InputError, nearest

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Labels:
    """How the values of a column are numbered.

    Attributes:
        class_names: In label order; None where integers have no names.
        numbers: Value -> label; None where the values are the labels.
        values: Of integers without names, each once, in order.
    """

    class_names: tuple[str, ...] | None
    numbers: Mapping[Any, int] | None
    values: tuple[int, ...] | None = None

    def of(self, value: Any) -> int | None:
        """The label of a value; None where it is null or empty."""
        if value is None or value == "":
            return None
        return int(value) if self.numbers is None else self.numbers[value]

    @classmethod
    def read(cls, source: str, values: "pa.ChunkedArray", names: Sequence[str] | None, *, rows: int) -> "Labels | None":
        """The numbering of a column.

        Args:
            source: For messages.
            values: The column, whole: integers, floating point without fractions, booleans or text.
            names: Of the integers, where they have names; of booleans how false and true are written.
            rows: So many are read, the first ones.

        Returns:
            None where no row has a label: all are null or empty, or −1, as Hugging Face marks a split without labels.

        Raises:
            InputError: labels that are negative, fractions, or beyond the names.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = values.type
        if pa.types.is_null(kind) or values.null_count == len(values):
            return None
        if pa.types.is_floating(kind):
            values = _whole(source, values)
        if pa.types.is_integer(values.type):
            return cls._of_integers(source, values, names, rows)
        if not pa.types.is_boolean(kind):
            values = pc.if_else(pc.equal(values, ""), pa.scalar(None, kind), values)
        distinct = sorted(pc.unique(values.drop_null()).to_pylist())
        if not distinct:
            return None
        numbers = {value: number for number, value in enumerate(distinct)}
        if pa.types.is_boolean(kind) and names:
            return cls(tuple(names[value] for value in distinct), numbers)
        return cls(tuple(map(str, distinct)), numbers)

    @classmethod
    def _of_integers(
        cls, source: str, values: "pa.ChunkedArray", names: Sequence[str] | None, rows: int
    ) -> "Labels | None":
        import pyarrow as pa

        given = values.is_valid().to_numpy()
        numbers = values.cast(pa.int64()).fill_null(-1).to_numpy()
        if (numbers == -1).all():
            return None
        classes = len(names) if names else None
        numbers, given = numbers[:rows], given[:rows]
        wrong = np.flatnonzero(given & ((numbers < 0) | (numbers >= (classes or np.inf))))
        if wrong.size:
            expected = f"in 0..{classes - 1}" if classes else "of 0 or more"
            got = values[int(wrong[0])].as_py()
            raise InputError(
                f"{source}: expected labels {expected}, got {got} in row {wrong[0]} and "
                f"{wrong.size} such rows; drop these rows, or choose another column (`label_column=…`)"
            )
        if names:
            return cls(tuple(map(str, names)), None)
        return cls(None, None, tuple(np.unique(numbers[given]).tolist()))


def numbered(names: Iterable[str], class_names: Sequence[str] | None) -> tuple[tuple[str, ...], list[int]]:
    """Names as labels: the class names, sorted where they are not given, and each name's place among them.

    Raises:
        InputError: a name that is not among the given ones.
    """
    names = list(names)
    known = tuple(sorted(set(names))) if class_names is None else tuple(class_names)
    places = {name: place for place, name in enumerate(known)}
    if unknown := [name for name in names if name not in places]:
        raise InputError(f"labels: expected one of the class names, got {unknown[0]!r}{nearest(unknown[0], known)}")
    return known, [places[name] for name in names]


def _whole(source: str, values: "pa.ChunkedArray") -> "pa.ChunkedArray":
    import pyarrow as pa

    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise InputError(f"{source}: expected whole numbers or names as labels, got {error}") from error
