"""Where a server has its files, which is nobody's business."""

import re

from tmm_engine.serving.collection import Collections
from tmm_engine.serving.settings import Settings


class Folders:
    """Of a server.

    Args:
        collections: What is served, from where.
        settings: Where collections are built, and of what.
    """

    def __init__(self, collections: Collections, settings: Settings) -> None:
        self._collections, self._settings = collections, settings

    def left_out_of(self, said: str) -> str:
        """A sentence in which files are named by what comes after these folders."""
        known = [
            self._settings.builds,
            self._settings.sources,
            *(each.path.parent for each in self._collections.values()),
        ]
        forms = {form for each in known if each for form in (each, each.resolve()) if len(form.parts) > 1}
        for folder in sorted(forms, key=lambda form: len(str(form)), reverse=True):  # what lies in another first
            own, name = rf"(?<![\w.-]){re.escape(str(folder))}", folder.name.replace("\\", r"\\")
            said = re.sub(rf"{own}(?=$|[^\w/.-]|\.(?:\s|$))", name, re.sub(rf"{own}/", "", said))
        return said
