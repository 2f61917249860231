"""`Client`: asks a server what `Engine` answers, with the same results."""

import base64
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, overload
from urllib.parse import quote

import numpy as np
from PIL import Image

from tmm_engine.classifying.classification import Classification
from tmm_engine.index.errors import ImageError, InputError, TmmEngineError, printable
from tmm_engine.index.progress import Progress, silent
from tmm_engine.options import SearchKeywords, SearchOptions
from tmm_engine.rerank.settings import TmmConfig, preset
from tmm_engine.results import FailedQuery, SearchResult, SearchResults
from tmm_engine.serving.keys import HEADER
from tmm_engine.serving.wire import classification_of, result_of
from tmm_engine.views.showing import as_picture, png_bytes

if TYPE_CHECKING:
    import httpx

TRIES = 5
LOOK_SECONDS = 0.2
BUSY = 503


class ServerError(TmmEngineError):
    """A server that cannot be reached, is too busy, or failed."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An exemplar of the server's collection, by its id, as a query."""

    id: str


Asked = str | Path | bytes | Image.Image | np.ndarray | Stored


class Client:
    """Asks one collection of a server::

        with Client("http://localhost:8000/photos") as client:
            result = client.search("query.png", k=10)

    Args:
        address: Of the server, with the collection's name behind it.
        key: Where the server has keys.
        seconds: To wait for an answer.

    Raises:
        InputError: another address, or the 'serve' extra is not installed.
    """

    def __init__(self, address: str, *, key: str | None = None, seconds: float = 600.0) -> None:
        try:
            import httpx
        except ImportError:
            raise InputError("Client needs the 'serve' extra: pip install 'tmm-engine[serve]'") from None
        server, _, name = address.rstrip("/").rpartition("/")
        if not server.startswith(("http://", "https://")) or not name:
            raise InputError(f"expected an address like http://localhost:8000/photos, got {address!r}")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise InputError("expected a key of letters, digits and signs, got one with others")
        headers = {} if key is None else {HEADER: key}
        self._address, self._base = address, f"/collections/{quote(name, safe='')}"
        self._http: httpx.Client = httpx.Client(base_url=server, headers=headers, timeout=seconds)

    def close(self) -> None:
        """Let go of the connection."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """What the collection holds: version, number of exemplars, modes, and as ``facts`` what `engine info` says."""
        return self._asked("GET", self._base)

    def exemplar(self, id_: str) -> Stored:
        """A stored exemplar as a query."""
        return Stored(id_)

    @overload
    def search(
        self, query: list[Asked], options: SearchOptions | None = None, **keywords: Unpack[SearchKeywords]
    ) -> SearchResults[SearchResult]: ...
    @overload
    def search(
        self, query: Asked, options: SearchOptions | None = None, **keywords: Unpack[SearchKeywords]
    ) -> SearchResult: ...
    def search(
        self, query: Asked | list[Asked], options: SearchOptions | None = None, **keywords: Unpack[SearchKeywords]
    ) -> SearchResult | SearchResults[SearchResult]:
        """As `Engine.search`.

        Args:
            query: A path, the bytes of a file, a PIL image, an array of uint8, an `exemplar`; or a list of them.
            options: As there.
            keywords: As there.

        Raises:
            InputError: as there, in the words of the command line.
            ServerError: it cannot be reached, is too busy, or failed.
        """
        found = self.search_each(query if isinstance(query, list) else [query], options, **keywords)
        for each in found:
            if isinstance(each, FailedQuery):
                raise ImageError(each.error if each.error.startswith(each.query) else f"{each.query}: {each.error}")
        results = SearchResults([each for each in found if isinstance(each, SearchResult)])
        return results if isinstance(query, list) else results[0]

    def search_each(
        self, queries: Sequence[Asked], options: SearchOptions | None = None, **keywords: Unpack[SearchKeywords]
    ) -> SearchResults[SearchResult | FailedQuery]:
        """As `Engine.search_each`: what is wrong with an image stands in the place of its answer."""
        asked = SearchOptions(**keywords) if options is None else replace(options, **keywords)
        items = [*_items(queries)]
        good = [item for item in items if isinstance(item, dict)]
        found: list[dict[str, Any]] = []
        if good:
            body = {"query": good, "pixels": True} | _told(asked)
            found = self._asked("POST", f"{self._base}/search", json=body)["results"]
        answers = map(result_of, found)
        return SearchResults(next(answers) if isinstance(item, dict) else item for item in items)

    def classify(
        self,
        query: Asked,
        options: SearchOptions | None = None,
        *,
        alpha: float = 0.05,
        outliers: float = 0.01,
        calibration: str | None = None,
        **keywords: Unpack[SearchKeywords],
    ) -> Classification:
        """As `Engine.classify`, for one query.

        Raises:
            InputError: as there.
            ServerError: as `search`.
        """
        asked = SearchOptions(**keywords) if options is None else replace(options, **keywords)
        doubt = {"alpha": alpha, "outliers": outliers, "calibration": calibration}
        [item] = _items([query])
        if isinstance(item, FailedQuery):
            raise ImageError(item.error)
        body = {"query": [item], "pixels": True} | _told(asked) | doubt
        [found] = self._asked("POST", f"{self._base}/classify", json=body)["results"]
        if "error" in found:
            raise ImageError(f"{found['query']}: {found['error']}")
        return classification_of(found)

    def put(
        self, id_: str, image: str | Path | bytes | Image.Image | np.ndarray, *, label: str | None = None
    ) -> dict[str, Any]:
        """Add an exemplar, or put another in its place: on disk, and found, when this returns.

        Returns:
            What the change did: ``version``, ``exemplars``, ``added``, ``replaced`` …
        """
        body = {"image": base64.b64encode(_content(image)).decode(), "label": label}
        return self._asked("PUT", f"{self._base}/exemplars/{_in_address(id_)}", json=body)

    def delete(self, id_: str) -> dict[str, Any]:
        """Remove an exemplar."""
        return self._asked("DELETE", f"{self._base}/exemplars/{_in_address(id_)}")

    def refresh(self) -> dict[str, Any]:
        """Let the newest version on disk be searched now."""
        return self._asked("POST", f"{self._base}/refresh")

    def audit(self, *, progress: Progress = silent, **options: Any) -> dict[str, Any]:
        """As `Engine.audit`, whose options these are: waits for the job.

        Returns:
            ``findings``, ``rules`` and ``notes`` as plain values.
        """
        job = self._asked("POST", f"{self._base}/audit", json=options)
        while job["ended"] is None:
            progress(job["step"] or "waiting", job["done"], max(1, job["total"]))
            time.sleep(LOOK_SECONDS)
            job = self._asked("GET", f"/jobs/{job['id']}")
        job = self._asked("GET", f"/jobs/{job['id']}")
        if job["state"] != "done":
            raise InputError(job["error"] or f"the audit was {job['state']}")
        found: dict[str, Any] = job["result"]
        return found

    def _asked(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """The answer; what is said to be too busy is asked again a few times.

        Raises:
            InputError: the request was at fault.
            ServerError: anything else.
        """
        for last in (*[False] * (TRIES - 1), True):
            response = self._sent(method, path, **request)
            if response.status_code != BUSY or last:
                break
            time.sleep(float(response.headers.get("retry-after", "1")))
        if response.is_success:
            found: dict[str, Any] = response.json()
            return found
        try:
            said = str(response.json()["detail"])
        except (ValueError, KeyError, TypeError):
            said = f"{self._address} is no server of this kind (it answers {response.status_code})"
        if response.is_server_error:
            raise ServerError(said)
        raise InputError(said)

    def _sent(self, method: str, path: str, **request: Any) -> "httpx.Response":
        import httpx

        try:
            return self._http.request(method, path, **request)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"{self._address} cannot be reached ({error or type(error).__name__})") from None


def _items(queries: Sequence[Asked]) -> Iterator[dict[str, str] | FailedQuery]:
    """Queries as the server takes them; for one that cannot be sent, why."""
    for position, query in enumerate(queries):
        if isinstance(query, Stored):
            yield {"id": query.id}
            continue
        name = _name(query, position)
        try:
            yield {"image": base64.b64encode(_content(query)).decode(), "name": name}
        except ImageError as error:
            yield FailedQuery(name, str(error))


def _name(query: Asked, position: int) -> str:
    return printable(query) if isinstance(query, str | Path) else f"query {position}"


def _content(image: str | Path | bytes | Image.Image | np.ndarray) -> bytes:
    """Of a file that has the image's pixels.

    Raises:
        ImageError: no such file, or an array of another kind.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise ImageError(
                f"{printable(image)}: expected an image file, got {error.strerror}; check the path"
            ) from None
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ImageError(f"expected an array (c, h, w) or (h, w) of uint8, got {image.dtype} of shape {image.shape}")
    return png_bytes(as_picture(image[None] if image.ndim == 2 else image))


def _told(asked: SearchOptions) -> dict[str, Any]:
    """Options as the server takes them."""
    names = ("k", "where", "stretch", "explain", "alone", "candidates", "prefilter", "label", "together")
    told: dict[str, Any] = {name: getattr(asked, name) for name in names}
    told |= {"mode": str(asked.mode), "recognition": "off" if asked.recognition is False else asked.recognition}
    if asked.config is not None:
        config = preset(asked.config) if isinstance(asked.config, str) else asked.config
        told["settings"] = _settings(config)
    return told


def _settings(config: TmmConfig) -> list[str]:
    """What makes the preset ``paper`` this configuration."""
    return [
        f"{name}={str(value).lower() if isinstance(value, bool) or value is None else value}"
        for name, value in config.to_json().items()
    ]


def _in_address(id_: str) -> str:
    """Wholly quoted: dots between slashes would be resolved on the way, and name another exemplar."""
    return quote(id_, safe="").replace(".", "%2E")
