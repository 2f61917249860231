from .errors import ImageError, IndexStateError, InputError, ModelError, TmmEngineError
from .models.choosing import Choice, settled
from .models.classifier import Classifier
from .neighbours.metric import Metric
from .neighbours.search import Neighbours
from .sources.arrays import ArraySource
from .sources.images import decode_image
from .sources.opening import open_source
from .sources.records import ImageRecord, ImageSource, UnreadableImage
from .store.embedding import BuildReport
from .store.exemplars import ExemplarStore
from .store.memory import MemoryStore

__all__ = [
    "ArraySource",
    "BuildReport",
    "Choice",
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
    "decode_image",
    "open_source",
    "settled",
]
