"""What an `index.json` of format 2 says, in the terms of format 3.

The one place in `index` that knows the names of others' columns: such indexes exist, and none is written again.
"""

from typing import Any

from tmm_engine.index.columns import FEATURE

FORMAT_2 = 2


def from_format_2(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest with `columns` instead of one dimension and a flag that stood for two columns.

    Raises:
        KeyError: it has no dimension or no flag.
        ValueError: the flag is none.
    """
    if not isinstance(content["global_trigger"], bool):
        raise ValueError("'global_trigger' must be true or false")
    others = ("global_feature", "stretched_feature") if content["global_trigger"] else ()
    kept = {key: value for key, value in content.items() if key not in ("feature_dim", "global_trigger")}
    return kept | {"columns": dict.fromkeys((FEATURE, *others), content["feature_dim"])}
