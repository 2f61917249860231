"""Names that look the same: é is one character where it was typed, and two (e, and an accent) as a Mac writes files."""

import unicodedata
from collections.abc import Collection, Iterable


def spelled(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """For each name the known one that it is: the same, or the only one that is the same but for its Unicode form.

    Args:
        names: As somebody wrote them.
        known: Where a look-up by `in` should be quick.

    Returns:
        The known name by the written one; a name that is not known, or could be several, is not in it.
    """
    names = list(names)
    found = {name: name for name in names if name in known}
    if len(found) < len(set(names)):
        forms: dict[str, list[str]] = {}
        for each in known:
            forms.setdefault(composed(each), []).append(each)
        for name in names:
            alike = forms.get(composed(name), [])
            if name not in found and len(alike) == 1:
                found[name] = alike[0]
    return found


def composed(name: str) -> str:
    """The form in which names that look the same are the same (NFC)."""
    return unicodedata.normalize("NFC", name)
