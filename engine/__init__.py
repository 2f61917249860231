"""What a user touches: `Engine`, results, reports, and the command `engine`.

Names are imported when they are first used.
"""

import lazy_loader as lazy

__version__ = "0.1.0"  # the one place: pyproject.toml and `engine --version` read it

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
