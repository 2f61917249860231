"""Results made by hand, to be shown: digits, their labels as classes."""

from dataclasses import replace

import numpy as np

from tests.digits import IMAGES as DIGITS
from tests.digits import LABELS
from tmm_engine.rerank import TmmConfig
from tmm_engine.results import Hit, SearchResult

IMAGES = DIGITS[:, None]  # (1797, 1, 8, 8)
HOSTILE = "<script>alert('x')</script>\" onmouseover=\"y & ü\n{{ 7*7 }}"


def make_hit(rank: int, *, mode: str = "l2", colour: bool = False) -> Hit:
    image = np.concatenate([IMAGES[rank], IMAGES[rank + 1], IMAGES[rank + 2]]) if colour else IMAGES[rank]
    label = int(LABELS[rank])
    confidence = 0.75 if mode == "tmm" else None
    name = f"the {label}"
    return Hit(rank, f"digit-{rank}", label, name, False, True, label, name, -1.5 - rank, confidence, {}, image)


def make_result(query: str = "q0", *, mode: str = "l2", k: int = 4, colour: bool = False) -> SearchResult:
    hits = tuple(make_hit(rank, mode=mode, colour=colour) for rank in range(k))
    trigger = np.linspace(-0.5, 0.25, hits[0].image.size, dtype=np.float32).reshape(hits[0].image.shape) if k else None
    tmm = mode == "tmm"
    return SearchResult(
        query=query,
        mode=mode,
        hits=hits,
        predicted_label=2,
        predicted_class="the 2",
        true_label=None,
        true_class=None,
        scored=1797,
        exemplars=1797,
        config=TmmConfig(seed=20).to_json() if tmm else None,
        backend="torch fp32 on cpu",
        timings={"features": 0.25, "search": 1.0},
        notes=("Only some were scored.",) if tmm else (),
        query_image=np.array(make_hit(9, colour=colour).image),
        trigger=trigger if tmm else None,
        triggered_query=make_hit(9, colour=colour).image / np.float32(200) if tmm else None,
    )


def make_wordy(text: str) -> SearchResult:
    """A result that has the text wherever a result holds text."""
    hit = replace(make_hit(0), id=text, class_name=text, predicted_class=f"{text}.", metadata={text: text, "n": None})
    return replace(
        make_result(text, mode="tmm"),
        hits=(hit,),
        predicted_class=text,
        notes=(text,),
        recognised_as=text,
        config=TmmConfig().to_json() | {text: text},
        timings={text: 1.0},
    )
