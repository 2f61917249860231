"""Which column of a table holds the images and which their labels: as somebody says, as the schema says, or by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tmm_engine.index.errors import InputError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

PATH_NAMES = (
    *("file_name", "path", "file", "filename", "filepath", "file_path"),
    *("image", "image_path", "img", "img_path", "id"),
)
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target", "fine_label", "coarse_label")

Features = Mapping[str, Mapping[str, Any]]
"""What Hugging Face's schema says of a column, so far as there is something."""


@dataclass(frozen=True, slots=True)
class Roles:
    """What columns are for.

    Attributes:
        image: The images' column.
        label: The labels' column; None where there are none.
        said: What was guessed, in a sentence; None where nothing had to be.
    """

    image: str
    label: str | None
    said: str | None


def roles_of(
    source: str, schema: "pa.Schema", features: Features, *, image: str | None, label: str | None, paths: bool
) -> Roles:
    """Which columns are for what.

    Args:
        source: For messages.
        schema: All columns.
        features: What Hugging Face's metadata say of them.
        image: The images' column, where somebody says it.
        label: The labels' column, where somebody says it.
        paths: Whether images are paths in a column of text, as in CSV; elsewhere that is looked for last.

    Raises:
        InputError: no such column, none that could hold images, or several that could be meant, which are listed.
    """
    chosen = image if image is not None else _image_column(source, schema, features, paths=paths)
    for name in filter(None, (image, label)):
        if schema.names.count(name) != 1:
            raise InputError(
                f"{source}: expected one column {name!r}{nearest(name, schema.names)}, got "
                f"{_listed(schema, schema.names)}"
            )
    if not _is_image(schema.field(chosen).type) and not is_text(schema.field(chosen).type):
        raise InputError(
            f"{source}: expected images in the column {chosen!r} (struct<bytes, path>, binary, or paths), got "
            f"{schema.field(chosen).type}; choose another (`image_column=…`)"
        )
    labels = label if label is not None else _label_column(source, schema, features, but=chosen)
    if labels is not None and not _is_label(schema.field(labels).type):
        raise InputError(
            f"{source}: expected integers or names in the label column {labels!r}, got {schema.field(labels).type}; "
            f"choose another (`label_column=…`)"
        )
    return Roles(chosen, labels, _said(schema, image, label, chosen, labels))


def is_text(kind: "pa.DataType") -> bool:
    """Whether a column is of strings, dictionaries of them included."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def is_binary(kind: "pa.DataType") -> bool:
    """Whether a column is of bytes."""
    import pyarrow as pa

    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _is_image(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return is_binary(fields["bytes"]) if "bytes" in fields else "path" in fields and is_text(fields["path"])
    return is_binary(kind)


def _is_label(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return is_text(kind) or any(
        test(kind) for test in (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating, pa.types.is_null)
    )


def _image_column(source: str, schema: "pa.Schema", features: Features, *, paths: bool) -> str:
    candidates = [field.name for field in schema if _is_image(field.type)]
    first, what = "image", "struct<bytes: binary, path: string>, or of bytes"
    if not candidates:
        candidates = _path_columns(schema)
        if len(candidates) > 1 or not paths:
            candidates = [name for name in candidates if name.lower() != "id"]
        of_paths = f"of the images' paths ({', '.join(PATH_NAMES)})"
        first, what = (PATH_NAMES[0], of_paths) if paths else (first, f"{what}, or {of_paths}")
    declared = [name for name in candidates if features.get(name, {}).get("_type") == "Image"]
    for group in (candidates, [name for name in candidates if name == first], declared):
        if len(group) == 1:
            return group[0]
    found = f"several, {_listed(schema, candidates)}" if candidates else f"none among {_listed(schema, schema.names)}"
    raise InputError(f"{source}: expected one column {what}, got {found}; say which (`image_column=…`)")


def _label_column(source: str, schema: "pa.Schema", features: Features, *, but: str) -> str | None:
    names = [name for name in schema.names if name != but and _is_label(schema.field(name).type)]
    if "label" in names:
        return "label"
    declared = [name for name in names if features.get(name, {}).get("_type") == "ClassLabel"]
    candidates = declared or [name for name in names if name.lower() in LABEL_NAMES]
    if len(candidates) > 1:
        raise InputError(
            f"{source}: the labels could be several columns, {_listed(schema, candidates)}; say which "
            f"(`label_column=…`)"
        )
    return candidates[0] if candidates else None


def _said(schema: "pa.Schema", image: str | None, label: str | None, chosen: str, labels: str | None) -> str | None:
    if labels is None:
        others = [field.name for field in schema if field.name != chosen and _is_label(field.type)]
        listed = f"; another can be chosen (`label_column=…`): {', '.join(others)}" if others else ""
        return f"images are the column {chosen!r}; no column is taken for labels{listed}" if others else None
    rivals = [] if image is not None else [name for name in _could_be_images(schema, chosen) if name != labels]
    beside = [] if label is not None else [name for name in _could_be_labels(schema) if name not in (chosen, labels)]
    guessed = (image is None and chosen != "image") or (label is None and labels != "label")
    if not guessed and not rivals and not beside:
        return None
    others = [
        f"{', '.join(names)} could be {what}" for names, what in ((rivals, "images"), (beside, "labels")) if names
    ]
    return "; ".join(
        (
            f"images are the column {chosen!r} (`image_column=…`), labels the column {labels!r} (`label_column=…`)",
            *others,
        )
    )


def _could_be_images(schema: "pa.Schema", chosen: str) -> list[str]:
    """Columns that hold what the chosen one does, by their type, or, of paths, by their name."""
    if _is_image(schema.field(chosen).type):
        return [field.name for field in schema if field.name != chosen and _is_image(field.type)]
    return [name for name in _path_columns(schema) if name not in (chosen, "id")]


def _path_columns(schema: "pa.Schema") -> list[str]:
    return [field.name for field in schema if is_text(field.type) and field.name.lower() in PATH_NAMES]


def _could_be_labels(schema: "pa.Schema") -> list[str]:
    return [field.name for field in schema if field.name.lower() in LABEL_NAMES and _is_label(field.type)]


def _listed(schema: "pa.Schema", names: Sequence[str]) -> str:
    return ", ".join(f"{name} ({schema.field(name).type})" for name in names)
