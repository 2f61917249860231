from .arrays import ArraySource
from .folders import FolderSource
from .images import decode_image
from .opening import open_source
from .parquet import ParquetSource
from .records import ImageRecord, ImageSource, UnreadableImage

__all__ = [
    "ArraySource",
    "FolderSource",
    "ImageRecord",
    "ImageSource",
    "ParquetSource",
    "UnreadableImage",
    "decode_image",
    "open_source",
]
