"""What stands in for parts of the bench in tests."""

import torch


class NotAttacked:
    """A retriever that no test attacks: it has the face of one, and fails if it is."""

    def embedding(self, pixels: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody attacks this retriever")
