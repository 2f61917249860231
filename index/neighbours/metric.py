"""What makes an exemplar near."""

from enum import StrEnum


class Metric(StrEnum):
    """What makes an exemplar near. Larger scores are nearer: minus the L2 distance, or the cosine similarity."""

    L2 = "l2"
    COSINE = "cosine"
