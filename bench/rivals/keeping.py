"""What rivals look at in the exemplars, kept in a folder: at 60,000 images it takes an hour, and a run may end."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tmm_engine.bench.rivals.parts import Part, Passes
from tmm_engine.index.errors import InputError
from tmm_engine.index.files import replacing
from tmm_engine.index.progress import Progress, silent

CHUNK = 1000  # images in a file

Vectors = dict[Part, Float[Tensor, "_ _"]]


def vectors_of(
    passes: Passes, images: UInt8[np.ndarray, "n c h w"], *, folder: Path | None = None, progress: Progress = silent
) -> Vectors:
    """Every part of every image, read from the folder or computed, and then kept there.

    Network, parts, what the engine chose, the sample that all was fitted on and the images tell vectors apart, the code
    does not: delete the folder when what computes them changes.

    Args:
        passes: Fitted.
        images: As stored.
        folder: Made if it is missing; a damaged file in it is replaced. None keeps nothing.
        progress: Told of images done.

    Raises:
        InputError: the folder cannot be written.
    """
    chunks = []
    for start in range(0, len(images), CHUNK):
        chunks.append(_chunk(passes, images[start : start + CHUNK], folder))
        progress("embedding", min(start + CHUNK, len(images)), len(images))
    return {part: torch.cat([chunk[part] for chunk in chunks]) for part in passes.parts}


def _chunk(passes: Passes, images: UInt8[np.ndarray, "n c h w"], folder: Path | None) -> Vectors:
    kept = None if folder is None else folder / f"{_digest(passes, images)}.safetensors"
    if kept is not None:
        try:
            found = load_file(kept)
            return {part: found[str(place)] for place, part in enumerate(passes.parts)}
        except (OSError, SafetensorError, KeyError):  # none yet, or damaged
            pass
    computed = passes(images.astype(np.float32) / np.float32(255.0))
    if kept is not None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as written:
                save_file({str(place): computed[part].contiguous() for place, part in enumerate(passes.parts)}, written)
        except OSError as error:
            raise InputError(f"cannot write {kept}: {error.strerror} (make room, or choose another folder)") from None
    return computed


def _digest(passes: Passes, images: UInt8[np.ndarray, "n c h w"]) -> str:
    about = json.dumps([passes.identity, [repr(part) for part in passes.parts], images.shape])
    digest = hashlib.sha256(about.encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()
