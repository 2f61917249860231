"""A judge from outside looks at the neighbours that each method found (§4.6, Table 1 of the paper).

It sees a query and the neighbour sets of all methods blind: as A, B, C, …, in an order shuffled for every query. The
judge is a vision-language model behind any endpoint that speaks OpenAI's protocol, or SSIM, which needs no network.
"""

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8
from openai import APIStatusError, OpenAIError
from openai.types.chat import ChatCompletionContentPartParam
from PIL import Image, ImageOps

from tmm_engine.bench.ssim import ssim
from tmm_engine.index.errors import InputError, TmmEngineError
from tmm_engine.index.sources.images import to_uint8

QUESTION = """\
You compare image retrieval systems. The first picture is the query. After it come the answers of {n} systems, sets \
{letters}: one picture for each set, showing the {k} images that the system found, the nearest first, in reading order.
Judge what the images show: the kind of object and its form. Ignore brightness, contrast, noise, colour cast, \
background and position.
1. For each set: how many of its {k} images are semantically alike to the query, from 0 to {k}?
2. Which set as a whole is semantically most alike to the query? Name several if they are equally good.
Answer with JSON only, in this form: {example}"""
"""What the judge is asked. The wording is ours: the paper reports the judgement, not its prompt."""


COLUMNS = 5  # neighbours beside each other in the picture of a set


GAP = 8


SMALLEST, LARGEST = 128, 256  # pixels that an image's longer side is brought to: 28 are too few to see, 1,000 too many


RETRIES = 6  # after 0.5, 1, 2, 4, 8 and 8 seconds, or what the server asks for


TIMEOUT = 120.0  # seconds


LONGEST_REASON = 200


ROUNDING = 1e-9  # of a mean SSIM: the same neighbours in another order are as good


Query = Float32[np.ndarray, "c h w"]


NeighbourSet = UInt8[np.ndarray, "k c h w"]


class OracleError(TmmEngineError):
    """The judge cannot be asked at all: a wrong key, an unknown model, an address where something else answers."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """On the sets in the order in which they were shown.

    Attributes:
        alike: How many neighbours of each set are alike to the query, from 0 to k; None if there is no verdict.
        preferred: Whether each set is the best or one of several equally good; None if there is no verdict.
        reason: Why there is no verdict.
    """

    alike: tuple[int, ...] | None
    preferred: tuple[bool, ...] | None
    reason: str | None = None


@runtime_checkable
class Judge(Protocol):
    """Whoever compares neighbour sets."""

    def judge(self, query: Query, sets: Sequence[NeighbourSet]) -> Verdict:
        """Compare sets of k neighbours each, not knowing whose they are.

        Raises:
            OracleError: asking again would be as futile.
        """


class SsimJudge:
    """Structural similarity: a set is preferred for its mean SSIM with the query.

    SSIM knows no "alike", so a neighbour counts as alike if its SSIM is at least the median over all sets shown.
    """

    def judge(self, query: Query, sets: Sequence[NeighbourSet]) -> Verdict:
        """As `Judge`; there is always a verdict."""
        similar = np.stack([ssim(query, neighbours.astype(np.float32) / 255) for neighbours in sets])  # (sets, k)
        alike = (similar >= np.median(similar)).sum(axis=1)
        means = similar.mean(axis=1)
        return Verdict(tuple(alike.tolist()), tuple((means >= means.max() - ROUNDING).tolist()))


class VisionJudge:
    """A vision-language model, asked `QUESTION` by the `openai` package, which retries and backs off by itself.

    The key comes from the environment variable OPENAI_API_KEY.

    Args:
        model: As the endpoint calls it.
        base_url: Of the endpoint, with ``/v1``; by default OPENAI_BASE_URL, else OpenAI's own.
        temperature: None leaves it to the model: reasoning models refuse to be given one.
        retries: After a failed connection, HTTP 408, 409, 429 and 5xx.
        timeout: Of one attempt, in seconds.

    Raises:
        InputError: the extra 'oracle' is not installed, or there is no key.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        temperature: float | None = 0.0,
        retries: int = RETRIES,
        timeout: float = TIMEOUT,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError:
            raise InputError("a judge needs the 'oracle' extra: pip install 'tmm-engine[oracle]'") from None
        if not os.environ.get("OPENAI_API_KEY"):
            raise InputError(
                "expected a key in OPENAI_API_KEY, got none; set it (to any text if the server needs none)"
            )
        self.model = model
        self._sampling: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        self._client = OpenAI(base_url=base_url, max_retries=retries, timeout=timeout)

    def judge(self, query: Query, sets: Sequence[NeighbourSet]) -> Verdict:
        """As `Judge`. Refusals, nonsense and servers that keep failing are no verdict.

        Raises:
            OracleError: the server refuses the key, the model or the request, or speaks another protocol.
        """
        from openai import APIStatusError

        content = make_content(query, sets)
        try:
            completion = self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": content}], **self._sampling
            )
        except APIStatusError as error:
            return self._no_verdict(error)
        except (OpenAIError, ValueError) as error:  # no connection, or broken JSON
            return _none(f"no answer: {error.__cause__ or error}")
        if isinstance(completion, str):  # a web page, say: the package hands on whatever is not JSON
            raise OracleError(
                f"expected an answer in OpenAI's protocol from {self._client.base_url}, got {completion[:40]!r}; check "
                "--base-url, which usually ends in /v1"
            )
        try:
            choice = completion.choices[0]
            refusal, answer = choice.message.refusal, choice.message.content or ""
        except (AttributeError, IndexError, TypeError):  # the package does not check what servers leave out
            return _none("the answer holds no message")
        if refusal or choice.finish_reason == "content_filter":
            return _none(f"refused: {refusal or 'content filter'}")
        return read_verdict(answer, sets=len(sets), k=len(sets[0]))

    def _no_verdict(self, error: "APIStatusError") -> Verdict:
        """For a failure that may pass; an error for one that will meet every query."""
        if error.code in ("content_filter", "content_policy_violation"):
            return _none(f"refused: {error.message}")
        passing = error.status_code >= 500 or error.status_code in (408, 409, 429)
        if passing and error.code != "insufficient_quota":
            return _none(error.message)
        if error.status_code == 401:  # some servers quote the key
            raise OracleError("the judge refused the key (HTTP 401); check OPENAI_API_KEY and --base-url") from None
        raise OracleError(
            f"the judge cannot be asked: {error.message[:LONGEST_REASON]}; check --judge-model ({self.model}), "
            f"--base-url ({self._client.base_url}) and what the account may use"
        ) from None


def make_question(sets: int, k: int) -> str:
    """`QUESTION` about so many sets of k neighbours."""
    letters = ascii_uppercase[:sets]
    example = json.dumps({"alike": dict.fromkeys(letters, 0), "best": [letters[0]]})
    return QUESTION.format(n=sets, k=k, letters=", ".join(letters), example=example)


def make_pictures(query: Query, sets: Sequence[NeighbourSet]) -> list[Image.Image]:
    """The query, then each set as rows of five neighbours; small images are enlarged until a model can see them."""
    return [_enlarged(to_uint8(query[None])[0]), *(_sheet(neighbours) for neighbours in sets)]


def make_content(query: Query, sets: Sequence[NeighbourSet]) -> "list[ChatCompletionContentPartParam]":
    """One message: the question, then every picture after its name; nothing in it tells the methods."""
    content: list[ChatCompletionContentPartParam] = [
        {"type": "text", "text": make_question(len(sets), len(sets[0]))},
    ]
    names = ["Query:", *(f"Set {letter}:" for letter in ascii_uppercase[: len(sets)])]
    for name, picture in zip(names, make_pictures(query, sets), strict=True):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        content += [{"type": "text", "text": name}, {"type": "image_url", "image_url": {"url": url}}]
    return content


def read_verdict(answer: str, *, sets: int, k: int) -> Verdict:
    """The verdict in an answer: its last JSON object of the form asked for, whatever stands around it.

    Counts may be written as text and a single best set without a list. Anything else that is missing, of unknown sets
    or out of range makes it no verdict.
    """
    letters = ascii_uppercase[:sets]
    decoder = json.JSONDecoder()
    verdict = _none(f"no verdict in the answer: {answer.strip()!r}")
    start = answer.find("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(answer, start)
            alike = tuple(int(str(found["alike"][letter])) for letter in letters)
            best = set(found["best"])  # of a string its letters: "A"
            if all(0 <= count <= k for count in alike) and best and best <= set(letters):
                verdict = Verdict(alike, tuple(letter in best for letter in letters))
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        start = answer.find("{", start + 1)
    return verdict


def _none(reason: str) -> Verdict:
    return Verdict(None, None, reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 1] + "…")


def _enlarged(image: UInt8[np.ndarray, "c h w"]) -> Image.Image:
    picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(np.moveaxis(image, 0, -1)))
    side = min(max(*picture.size, SMALLEST), LARGEST)
    return ImageOps.contain(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC)


def _sheet(neighbours: NeighbourSet) -> Image.Image:
    tiles = [_enlarged(image) for image in neighbours]
    width, height = (side + GAP for side in tiles[0].size)
    lines = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (min(len(tiles), COLUMNS) * width - GAP, lines * height - GAP), "white")
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % COLUMNS * width, place // COLUMNS * height))
    return sheet
