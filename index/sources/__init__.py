"""Where exemplars come from: folders, Parquet files, data sets, arrays -> a stream of decoded, checked images.

Names are imported when they are first used.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
