"""Labels and classes: an exemplar's label is a name of the user's, its predicted class is one of the model's.

A label is stored as a number: below C that of the model's class of the same name, from C on that of a name that no
class of the model's has. Names are matched by name, never by position; only a model that brings no names takes those
of a source that has as many classes, in their order.
"""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from tmm_engine.index.errors import InputError
from tmm_engine.index.names import spelled
from tmm_engine.index.wording import some

DIGITS = 10  # so many numbers are in the same order as numbers and as text
COMPARED = 100  # names without a class for which the nearest is looked for
NEAR = 0.8  # of `difflib`'s ratio


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The names of an index's labels.

    Attributes:
        class_names: The model's classes, in their order; C of them.
        others: Labels that are no class of the model's; the first has the number C.
    """

    class_names: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all labels, by their number."""
        return (*self.class_names, *self.others)

    def is_class(self, label: int) -> bool:
        """Whether a label's number is that of a class of the model's."""
        return 0 <= label < len(self.class_names)

    def numbers(self) -> dict[str, int]:
        """The number of every label by its name; a name that several classes have is none of them."""
        times = Counter(self.class_names)
        own = {name: len(self.class_names) + place for place, name in enumerate(self.others)}
        return own | {name: label for label, name in enumerate(self.class_names) if times[name] == 1}


@dataclass(frozen=True, slots=True)
class Matched:
    """A source's labels in an index.

    Attributes:
        vocabulary: The index's, with what the source adds to it.
        numbers: For each class of the source its label's number; of a table's numbers that are names, by the number;
            None where records have that number already.
        notes: What was guessed, and what is no class of the model's, in sentences.
        otherwise: Where names that are numbers can be read in two ways: for each class of the model's the class that
            the label of its number would be in the other one.
    """

    vocabulary: Vocabulary
    numbers: tuple[int, ...] | Mapping[int, int] | None
    notes: tuple[str, ...] = ()
    otherwise: tuple[int, ...] | None = None

    def read_otherwise(self, labels: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """What labels of the index would be if names that are numbers were read the other way."""
        if self.otherwise is None:
            return labels
        rest = range(len(self.otherwise), len(self.vocabulary.names))
        return np.array([*self.otherwise, *rest], dtype=np.int64)[labels]

    def label(self, number: int | None, id_: str) -> int | None:
        """The index's number of a record's label.

        Args:
            number: Among the source's classes; None for a record without a label.
            id_: The record's, for messages.

        Raises:
            InputError: there is no such class.
        """
        if number is None:
            return None
        if isinstance(self.numbers, Mapping):
            return self.numbers[number]
        classes = len(self.vocabulary.class_names) if self.numbers is None else len(self.numbers)
        if not 0 <= number < classes:
            raise InputError(
                f"{id_}: label {number}, but the model's head has {classes} classes (0 to {classes - 1}): is this the "
                f"data set the model was trained on? Labels of your own are texts, or have names"
            )
        return number if self.numbers is None else self.numbers[number]


def match_labels(
    source: str,
    names: Sequence[str] | None,
    vocabulary: Vocabulary,
    *,
    values: Sequence[int] | None = None,
    adopt: bool = False,
    named: bool = False,
) -> Matched:
    """What the labels of a source that has some are in an index.

    Args:
        source: Its name, for what is said.
        names: Of its classes; None where labels are numbers: those of the model's classes.
        vocabulary: The index's.
        values: Of a table whose labels are numbers without names, each once: they are names where all of them are
            known as such, or some are beyond the numbers of the model's classes.
        adopt: For a new index, of a model that brings no names: take those of a source with as many classes, in their
            order; those of fewer that are numbers are the numbers of its classes.
        named: The model's names were given, even if they look like none: match them.
    """
    classes = vocabulary.class_names
    named = named or bring_names(classes)
    if names is None and values is not None:
        return _of_a_table(source, values, vocabulary, named=named)
    if names is None:
        return Matched(vocabulary, None, (_numbers_taken(source, classes),) if named else ())
    if tuple(names) == classes:
        return Matched(vocabulary, None)
    if not named and (adopt or len(classes) > DIGITS):
        values = _as_numbers(names)
        if adopt and len(names) == len(classes):
            return _adopted(source, names, values)
        if values and max(values) < len(classes):
            return _taken_as_numbers(source, names, values, vocabulary)
    return _by_name(source, names, vocabulary, named=named)


def bring_names(class_names: Sequence[str]) -> bool:
    """Whether a model's class names say more than the numbers of its classes."""
    return any(name not in (str(number), f"LABEL_{number}") for number, name in enumerate(class_names))


def nearest_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """For each name that is almost one of the known its nearest: written otherwise, or a few letters off."""
    plain = {_plain(name): name for name in known}
    found = {}
    for name in names:
        close = [_plain(name)] if _plain(name) in plain else difflib.get_close_matches(_plain(name), plain, 1, NEAR)
        if close:
            found[name] = plain[close[0]]
    return found


def _adopted(source: str, names: Sequence[str], values: Sequence[int] | None) -> Matched:
    """A source's names for the classes of a model that brings none; as numbers they may be in another order."""
    note = (
        f"the model brings no class names: those of {source}, in their order, are taken for its classes (class 0 is "
        f"{names[0]!r}, class {len(names) - 1} is {names[-1]!r})"
    )
    if values is None or list(values) == sorted(values):
        return Matched(Vocabulary(tuple(names)), None, (note,))
    order = sorted(values)
    otherwise = tuple(map(order.index, values))
    return Matched(
        Vocabulary(tuple(names)), None, (note, _two_readings(names, range(len(names)), otherwise)), otherwise
    )


def _taken_as_numbers(source: str, names: Sequence[str], values: Sequence[int], vocabulary: Vocabulary) -> Matched:
    """Names that are numbers of classes, though not of all."""
    classes = len(vocabulary.class_names)
    note = (
        f"the model brings no class names, and those of {source} are numbers, but of {len(names):,} of its {classes:,} "
        f"classes: they are taken for the numbers of its classes ({names[-1]!r} is class {values[-1]})"
    )
    text_order = sorted(map(str, range(classes)))
    otherwise = tuple(text_order.index(str(number)) for number in range(classes))
    notes = [note]
    if any(otherwise[value] != value for value in values):
        notes.append(_two_readings(names, values, [otherwise[value] for value in values]))
    return Matched(vocabulary, tuple(values), tuple(notes), otherwise if len(notes) > 1 else None)


def _two_readings(names: Sequence[str], taken: Sequence[int], otherwise: Sequence[int]) -> str:
    """A warning, with the first name that the two ways to read numbers do not agree about."""
    name, now, then = next(each for each in zip(names, taken, otherwise, strict=True) if each[1] != each[2])
    return (
        f"warning: names that are numbers can be read in two ways: sorted as text, as torchvision's ImageFolder does, "
        f"or as numbers. {name!r} is taken for the model's class {now}, and would be class {then} the other way. To "
        f"say which: give the names of the model's classes, in their order (`class_names=…`), or rename the folders so "
        f"that both orders are one (00, 01, …)"
    )


def _numbers_taken(source: str, classes: Sequence[str]) -> str:
    return f"labels of {source} are numbers: they are taken for those of the model's classes (0 is {classes[0]!r})"


def _of_a_table(source: str, values: Sequence[int], vocabulary: Vocabulary, *, named: bool) -> Matched:
    """Numbers of a table, which may be those of the model's classes, or names, as years are."""
    classes, known, names = vocabulary.class_names, vocabulary.numbers(), [str(value) for value in values]
    beyond = [value for value in values if value >= len(classes)]
    all_known = (named or bool(beyond)) and all(name in known for name in names)
    if not beyond and not all_known:
        return Matched(vocabulary, None, (_numbers_taken(source, classes),) if named else ())
    why = (
        "all are names that the index knows"
        if all_known
        else f"{some(map(str, beyond))} {'is no number' if len(beyond) == 1 else 'are no numbers'} of the model's "
        f"{len(classes):,} classes (0 to {len(classes) - 1})"
    )
    found = _by_name(source, names, vocabulary, named=named)
    assert isinstance(found.numbers, tuple)
    note = f"labels of {source} are numbers: they are taken for names, not for positions, since {why}"
    if not all_known and len(beyond) < len(values):
        note = f"warning: {note}; if they are positions, count them from 0"
    return replace(found, numbers=dict(zip(values, found.numbers, strict=True)), notes=(note, *found.notes))


def _as_numbers(names: Sequence[str]) -> list[int] | None:
    """What the names are as numbers; None where one is none, or two are the same."""
    values = [int(name) for name in names if re.fullmatch(r"[0-9]{1,9}", name)]
    return values if len(set(values)) == len(names) else None


def _by_name(source: str, names: Sequence[str], vocabulary: Vocabulary, *, named: bool) -> Matched:
    known = spelled(names, vocabulary.numbers())
    new = [name for name in dict.fromkeys(names) if name not in known]
    grown = replace(vocabulary, others=(*vocabulary.others, *new))
    numbers = grown.numbers()
    found = tuple(numbers[known.get(name, name)] for name in names)
    notes = _said(source, names, new, vocabulary)
    if new and known and not named:
        notes = (
            *notes,
            f"warning: the others ({some(map(repr, known))}) are taken for the numbers of the model's classes; if they "
            f"are not, give the names of its classes, in their order (`class_names=…`), or rename the folders",
        )
    return Matched(grown, found, notes)


def _said(source: str, names: Sequence[str], new: Sequence[str], vocabulary: Vocabulary) -> tuple[str, ...]:
    """About names that are new to an index."""
    if not new:
        return ()
    classes = len(vocabulary.class_names)
    model = "the model's" if bring_names(vocabulary.class_names) else f"the model's {classes:,}, which have no names"
    notes = [
        f"{len(new):,} of the {len(set(names)):,} labels of {source} are no class of {model}: "
        f"{some(map(repr, new))}; they are kept as labels of their own, beside the class that the model predicts"
    ]
    if several := [name for name in new if name in vocabulary.class_names]:
        notes.append(
            f"several classes of the model's have one name: {some(map(repr, several))}; such a label is none of them, "
            f"but one of its own"
        )
    others = [name for name in new if name not in several][:COMPARED]
    if near := nearest_names(others, vocabulary.names):
        pairs = some(f"{name!r} (nearest: {known!r})" for name, known in near.items())
        notes.append(f"labels that are almost known, but not the same: {pairs}; rename them where the same is meant")
    return tuple(notes)


def _plain(name: str) -> str:
    """Without case, punctuation and ways to encode accents."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
