from .builder import BuildReport, build_index
from .classifier import Classifier
from .errors import ImageError, IndexStateError, InputError, ModelError, TmmEngineError
from .images import decode_image
from .neighbours import Metric, Neighbours
from .sources import ArraySource, ImageRecord, ImageSource, UnreadableImage, open_source
from .store import ExemplarStore, MemoryStore

__all__ = [
    "ArraySource",
    "BuildReport",
    "Classifier",
    "ExemplarStore",
    "ImageError",
    "ImageRecord",
    "ImageSource",
    "IndexStateError",
    "InputError",
    "MemoryStore",
    "Metric",
    "ModelError",
    "Neighbours",
    "TmmEngineError",
    "UnreadableImage",
    "build_index",
    "decode_image",
    "open_source",
]
