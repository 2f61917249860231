"""The shape that images of many sizes are brought to where nobody says one."""

from collections import Counter
from collections.abc import Sequence
from statistics import median_low

from tmm_engine.index.types import ImageShape

MAX_NATURAL_SIDE = 224


def capped(shape: ImageShape) -> ImageShape:
    """The shape, or (c, 224, 224) where a side is longer than that."""
    channels, height, width = shape
    return (channels, MAX_NATURAL_SIDE, MAX_NATURAL_SIDE) if max(height, width) > MAX_NATURAL_SIDE else shape


def common_shape(shapes: Sequence[ImageShape]) -> ImageShape:
    """The commonest number of channels with the commonest size, or with the median sides where no size is that of half.

    Args:
        shapes: Of at least one image; of two that are equally common the one that comes first is taken.
    """
    sizes = [capped(shape)[1:] for shape in shapes]
    [(size, votes)] = Counter(sizes).most_common(1)
    height, width = size
    if 2 * votes < len(sizes):
        height, width = (median_low(sides) for sides in zip(*sizes, strict=True))
    return Counter(channels for channels, _, _ in shapes).most_common(1)[0][0], height, width


def said_shapes(shapes: Sequence[ImageShape]) -> str | None:
    """What a user should know of the choice; None where all images agree."""
    if len({capped(shape) for shape in shapes}) == 1:
        return None
    channels, height, width = common_shape(shapes)
    _, *smallest = min(shapes, key=lambda shape: shape[1] * shape[2])
    _, *largest = max(shapes, key=lambda shape: shape[1] * shape[2])
    kinds = len({channels for channels, _, _ in shapes})
    return (
        f"the first {len(shapes)} images are {smallest[0]}×{smallest[1]} to {largest[0]}×{largest[1]} (height × width)"
        f"{', some grey and some coloured' if kinds > 1 else ''}; the commonest is taken: {height}×{width}, "
        f"{'grey' if channels == 1 else 'coloured'} (others: `image_size=…`, `channels=…`)"
    )
