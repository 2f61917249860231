"""What a terminal is told: messages are written for Python, and name in backticks what is said here as an option."""

import re

from tmm_engine.index.errors import visible

FLAGS = {
    "against=…": "--against",
    "calibration='leave-one-out'": "--leave-one-out",
    "calibration=…": "--calibration",
    "channels=…": "--channels",
    "class_names=…": "--class-names",
    "cpus=…": "--ray-cpus",
    "delete=True": "--delete",
    "ema=True": "--ema",
    "head=…": "--head",
    "id_prefix=…": "--id-prefix",
    "image_column=…": "--image-column",
    "image_shape=(1, h, w)": "--channels 1",
    "image_shape=(3, h, w)": "--channels 3",
    "image_shape=(c, h, w)": "--image-size",
    "image_size=…": "--image-size",
    "label_column=…": "--label-column",
    "mean=…": "--mean",
    "memory=…": "--memory",
    "max_pool=False": "--no-max-pool",
    "max_pool=True": "--max-pool",
    "overwrite=True": "--overwrite",
    "replace=True": "--replace",
    "sources=…": "--sources",
    "split=…": "--split",
    "std=…": "--std",
    "strict=True": "--strict",
    "views=1": "--views 1",
    "views=…": "--views",
}
COMMANDS = {
    "build_index": "engine build-index",
    "export_onnx": "engine export-onnx",
    "repair_index": "engine repair",
    "verify_index": "engine verify",
}


def for_command_line(message: str) -> str:
    """A message with flags and commands instead of arguments and functions, its control characters spelled out."""

    def said(found: re.Match[str]) -> str:
        name = found[1]
        return FLAGS.get(name) or (f"`{COMMANDS[name]}`" if name in COMMANDS else found[0])

    return visible(re.sub(r"`([^`]*)`", said, message))
