"""Labels and classes: an exemplar's label is a name of the user's, its predicted class is one of the model's.

A label is stored as a number: below C that of the model's class of the same name, from C on that of a name that no
class of the model's has. Names are matched by name, never by position; only a model that brings no names takes those
of a source that has as many classes, in their order.
"""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tmm_engine.index.errors import InputError
from tmm_engine.index.names import spelled

LISTED = 5  # names that a message lists
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
        numbers: For each class of the source its label's number; None where records have that number already.
        notes: What was guessed, and what is no class of the model's, in sentences.
    """

    vocabulary: Vocabulary
    numbers: tuple[int, ...] | None
    notes: tuple[str, ...] = ()

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
        classes = len(self.vocabulary.class_names) if self.numbers is None else len(self.numbers)
        if not 0 <= number < classes:
            raise InputError(
                f"{id_}: label {number}, but the model's head has {classes} classes (0 to {classes - 1}): is this the "
                f"data set the model was trained on? Labels of your own are texts, or have names"
            )
        return number if self.numbers is None else self.numbers[number]


def match_labels(source: str, names: Sequence[str] | None, vocabulary: Vocabulary, *, adopt: bool = False) -> Matched:
    """What a source's labels are in an index.

    Args:
        source: Its name, for what is said.
        names: Of its classes; None where it has no labels, or labels that are numbers: those of the model's classes.
        vocabulary: The index's.
        adopt: For a new index, of a model that brings no names: take those of a source with as many classes.
    """
    classes = vocabulary.class_names
    if names is None or tuple(names) == classes:
        return Matched(vocabulary, None)
    if adopt and len(names) == len(classes) and not bring_names(classes):
        return Matched(Vocabulary(tuple(names)), None, (_adopted(source, names),))
    known = spelled(names, vocabulary.numbers())
    new = [name for name in dict.fromkeys(names) if name not in known]
    grown = replace(vocabulary, others=(*vocabulary.others, *new))
    numbers = grown.numbers()
    found = tuple(numbers[known.get(name, name)] for name in names)
    return Matched(grown, found, _said(source, names, new, vocabulary))


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


def listed(texts: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join(texts[:LISTED]) + (", …" if len(texts) > LISTED else "")


def _adopted(source: str, names: Sequence[str]) -> str:
    return (
        f"the model brings no class names: those of {source}, in their order, are taken for its classes (class 0 is "
        f"{names[0]!r}, class {len(names) - 1} is {names[-1]!r})"
    )


def _said(source: str, names: Sequence[str], new: Sequence[str], vocabulary: Vocabulary) -> tuple[str, ...]:
    """About names that are new to an index."""
    if not new:
        return ()
    classes = len(vocabulary.class_names)
    model = "the model's" if bring_names(vocabulary.class_names) else f"the model's {classes:,}, which have no names"
    notes = [
        f"{len(new):,} of the {len(set(names)):,} labels of {source} are no class of {model}: "
        f"{listed([*map(repr, new)])}; they are kept as labels of their own, beside the class that the model predicts"
    ]
    if near := nearest_names(new[:COMPARED], vocabulary.names):
        pairs = listed([f"{name!r} (nearest: {known!r})" for name, known in near.items()])
        notes.append(f"labels that are almost known, but not the same: {pairs}; rename them where the same is meant")
    return tuple(notes)


def _plain(name: str) -> str:
    """Without case, punctuation and ways to encode accents."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
