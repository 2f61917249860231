"""Classifiers of timm and transformers: built from a name or a folder on disk, with what they do to a picture before.

Nothing is ever fetched, and no code in a folder is run.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tmm_engine.index.errors import ModelError, nearest
from tmm_engine.index.models.pipelines import Pipeline, pipeline_of
from tmm_engine.index.types import ImageShape

if TYPE_CHECKING:
    from tmm_engine.index.models.architectures import ModelSpec

TIMM, HF = "timm:", "hf:"
PASSING = frozenset(  # of a configuration: where a model came from and what it calls its classes, not what it computes
    ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id")
)
IMAGENET_CLASSES = 1000
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True, eq=False)
class LibraryModel:
    """What a library says of a model.

    Attributes:
        architecture: ``timm:NAME`` or ``hf:TYPE``.
        pipeline: From a picture to what it takes.
        num_classes: Of the model as it is said; weights may have others.
        class_names: In label order, where it knows any.
        config: Of transformers, and what a model of timm is built with beside its name, as JSON text; else empty.
        weights: The file of the weights, where a folder holds it.
        network: With its weights, where the library reads them.
        notes: What was guessed, in words.
    """

    architecture: str
    pipeline: Pipeline
    num_classes: int
    class_names: tuple[str, ...] | None = None
    config: str = ""
    weights: Path | None = None
    network: nn.Module | None = None
    notes: tuple[str, ...] = ()


def is_library(architecture: str) -> bool:
    """Whether the model is one of timm's or transformers'."""
    return architecture.startswith((TIMM, HF))


def build_library_model(spec: "ModelSpec") -> nn.Module:
    """With random weights.

    Raises:
        ModelError: the package is not installed, or does not know the model.
    """
    if spec.architecture.startswith(TIMM):
        name, given = spec.architecture.removeprefix(TIMM), json.loads(spec.config or "{}")
        return _timm_model(name, spec.num_classes, spec.image_shape, given)
    transformers = _package("transformers", "hf")
    try:
        config = transformers.AutoConfig.for_model(**json.loads(spec.config))
        with _quiet():
            model: nn.Module = transformers.AutoModelForImageClassification.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"transformers {transformers.__version__} cannot build {spec.architecture!r} from what is stored of it: "
            f"{error} (install the version that it was made with)"
        ) from error
    return model


def timm_described(name: str, weights: Path | None, image_shape: ImageShape | None) -> LibraryModel:
    """A model of timm by its name, or by a folder that timm's ``save_for_hf`` or a hub's copy made.

    Args:
        name: As in ``resnet50.a1_in1k``, or the folder.
        weights: A checkpoint, such a folder, or nothing.
        image_shape: Other channels and another size than its configuration says.

    Raises:
        ModelError: timm is not installed, no such model, or an evaluation transform that cannot be said.
    """
    timm = _package("timm", "timm")
    folder = next((each for each in (Path(name), weights) if each is not None and each.is_dir()), None)
    saved = {} if folder is None else _json(folder / "config.json")
    if folder is not None and Path(name).is_dir():
        name = str(saved.get("architecture", ""))
    own = saved.get("pretrained_cfg")
    told: dict[str, Any] = own if isinstance(own, dict) else {}
    arguments = {} if image_shape is None else {"input_size": image_shape}
    classes = int(saved.get("num_classes", 0)) or None
    model = _timm_model(name, classes, None)
    config = timm.data.resolve_data_config(arguments, pretrained_cfg=told or model.pretrained_cfg)
    pipeline = pipeline_of(timm.data.create_transform(**config), channels=config["input_size"][0])
    given = _timm_arguments(name, saved.get("model_args"))
    return LibraryModel(
        _timm_architecture(name),
        pipeline,
        model.num_classes,
        _timm_names(saved) or _timm_names(told or model.pretrained_cfg),
        config=json.dumps(given, sort_keys=True) if given else "",
        weights=_weights_in(folder) if folder is not None and (weights is None or weights.is_dir()) else weights,
    )


def hf_described(folder: Path, *, with_weights: bool) -> LibraryModel:
    """An image classifier that transformers saved in a folder, with its image processor.

    Raises:
        ModelError: no such folder, transformers is not installed, a file is missing, or a processor that cannot be
            said.
    """
    if not folder.is_dir():
        raise ModelError(_how_to_save(str(folder)))
    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise ModelError(
                f"expected {file} in {folder}, got none (save model and image processor into one folder: "
                "AutoImageProcessor.from_pretrained(…).save_pretrained(folder))"
            )
    transformers = _package("transformers", "hf")
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            processor = transformers.AutoImageProcessor.from_pretrained(folder, **offline)
            config = transformers.AutoConfig.from_pretrained(folder, **offline)
            network = _loaded(transformers, folder, offline) if with_weights else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ModelError(f"{folder}: transformers cannot read it as an image classifier: {error}") from error
    return hf_model(network, config, processor)


def hf_model(network: nn.Module | None, config: Any, processor: object) -> LibraryModel:
    """What a configuration and a processor of transformers say."""
    channels = getattr(config, "num_channels", 3)
    return LibraryModel(
        f"{HF}{config.model_type}",
        pipeline_of(processor, channels=channels),
        config.num_labels,
        _hf_names(config),
        config=_config_text(config),
        network=network,
    )


def module_described(network: nn.Module, processor: object, *, needed: bool) -> LibraryModel | None:
    """What a model that the user has at hand says of itself, if it is timm's or transformers'.

    Args:
        network: The model.
        processor: Its image processor or transform, where the caller has it.
        needed: Look for one, and fail without one.

    Raises:
        ModelError: its image processor is needed and nowhere to be found.
    """
    if processor is None and not needed:
        return None
    library, config = _origin(network)
    if library == TIMM:
        timm = _package("timm", "timm")
        if processor is None:
            processor = timm.data.create_transform(**timm.data.resolve_data_config(model=network))
        return LibraryModel(
            _timm_architecture(str(config["architecture"])),
            pipeline_of(processor, channels=_first_channels(network)),
            int(getattr(network, "num_classes", IMAGENET_CLASSES)),
        )
    if library == HF:
        return hf_model(None, config, processor or _own_processor(config))
    return None


def names_of_module(network: nn.Module) -> tuple[str, ...] | None:
    """The class names that a model of timm or transformers brings, in label order; None if it is none or knows none."""
    library, config = _origin(network)
    if library == HF:
        return _hf_names(config)
    if library != TIMM:
        return None
    names, classes = _timm_names(config), getattr(network, "num_classes", IMAGENET_CLASSES)
    return names if names and len(names) == classes else None  # a new head keeps the configuration of the old one


def _origin(network: nn.Module) -> tuple[str, Any]:
    """(the library whose model it is, what it says of itself)."""
    package = type(network).__module__.partition(".")[0]
    told = getattr(network, "pretrained_cfg", None)
    if package == "timm" and isinstance(told, Mapping) and told.get("architecture"):
        return TIMM, told
    config = getattr(network, "config", None)
    return (HF, config) if package == "transformers" and config is not None else ("", None)


def _timm_architecture(name: str) -> str:
    """Without the tag, which says whose the weights were and not what the network is."""
    return f"{TIMM}{name.partition('.')[0]}"


def _timm_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What a configuration calls its classes; ImageNet's where its tag says that the weights are."""
    names = config.get("label_names")
    if isinstance(names, dict):
        numbers = [str(number) for number in range(len(names))]
        if {*map(str, names)} != {*numbers}:
            raise ModelError(f"expected 'label_names' as a list or by number from 0 on, got {names!r:.100}")
        by_number = {str(number): name for number, name in names.items()}
        return tuple(str(by_number[number]) for number in numbers)
    if isinstance(names, list | tuple):
        return tuple(map(str, names))
    if config.get("num_classes") != IMAGENET_CLASSES or "in1k" not in str(config.get("tag")).split("_"):
        return None
    return tuple(_package("timm", "timm").data.ImageNetInfo("imagenet-1k").label_descriptions())


def _timm_arguments(name: str, given: object) -> dict[str, Any]:
    """What a folder says that its model was built with, but for what changes nothing of what is computed."""
    if not isinstance(given, dict):
        return {}
    given = {key: value for key, value in given.items() if key not in ("num_classes", "in_chans")}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        plain, wanted = (_timm_model(name, None, None, arguments).eval() for arguments in ({}, given))
        for parameter in wanted.parameters():
            parameter.normal_(std=0.1)  # some begin as zeros, and hide what is behind them
        try:
            plain.load_state_dict(wanted.state_dict())
            images = torch.rand(1, *plain.pretrained_cfg["input_size"])
            return {} if torch.equal(plain(images), wanted(images)) else given
        except (RuntimeError, AssertionError):  # other tensors, other sizes
            return given


def _hf_names(config: Any) -> tuple[str, ...] | None:
    known = getattr(config, "id2label", None) or {}
    if any(label not in known for label in range(config.num_labels)):
        return None  # a configuration with a number of labels of its own
    names = tuple(str(known[label]) for label in range(config.num_labels))
    return None if names == tuple(f"LABEL_{label}" for label in range(len(names))) else names


def _first_channels(network: nn.Module) -> int:
    convolutions = (module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
    return next(convolutions, 3)


def _own_processor(config: Any) -> object:
    """Of the folder, or the local copy of a hub's, that a model was loaded from."""
    transformers = _package("transformers", "hf")
    origin = getattr(config, "name_or_path", "")
    try:
        with _quiet():
            return transformers.AutoImageProcessor.from_pretrained(
                origin or "nowhere", local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"expected the model's image processor, found none at {origin!r} (pass it: "
            "processor=AutoImageProcessor.from_pretrained(…))"
        ) from error


def _config_text(config: Any) -> str:
    content = {key: value for key, value in config.to_dict().items() if key not in PASSING}
    return json.dumps(content | {"num_labels": config.num_labels}, sort_keys=True)


def _loaded(transformers: Any, folder: Path, options: Mapping[str, bool]) -> nn.Module:
    network: nn.Module
    network, found = transformers.AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True, **options
    )
    if missing := sorted(map(str, found["missing_keys"])):
        raise ModelError(
            f"expected all weights of {type(network).__name__} in {folder}, got none for {', '.join(missing[:5])} "
            "(a backbone without its classifier? fine-tune it, and save that)"
        )
    return network


def _how_to_save(name: str) -> str:
    return (
        f"expected a folder after 'hf:', got {name!r}, which is none; nothing is ever fetched. Save it once, in "
        "Python, where there is a connection: from transformers import AutoImageProcessor, "
        f"AutoModelForImageClassification; AutoModelForImageClassification.from_pretrained({name!r})"
        f".save_pretrained('model'); AutoImageProcessor.from_pretrained({name!r}).save_pretrained('model') "
        "(then it is hf:model)"
    )


def _timm_model(
    name: str, num_classes: int | None, image_shape: ImageShape | None, given: Mapping[str, Any] | None = None
) -> Any:
    timm = _package("timm", "timm")
    if not timm.is_model(name):
        known = timm.list_models()
        raise ModelError(
            f"expected a model of timm {timm.__version__}, or a folder with its config.json, got {name!r}"
            f"{nearest(name.partition('.')[0], known)}"
        )
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in (given or {}).items()}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if image_shape is not None:
        options["in_chans"] = image_shape[0]
        told = timm.get_pretrained_cfg(name)
        if (
            "img_size" not in options
            and told is not None
            and told.fixed_input_size
            and tuple(told.input_size[1:]) != image_shape[1:]
        ):
            options["img_size"] = image_shape[1:]
    try:
        return timm.create_model(name, pretrained=False, **options)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ModelError(f"timm {timm.__version__} cannot build {name!r} with {options}: {error}") from error


def _weights_in(folder: Path) -> Path:
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise ModelError(f"expected one of {', '.join(WEIGHT_FILES)} in {folder}, got none")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"expected a configuration in {path}, got {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"expected an object in {path}, got {type(content).__name__}")
    return content


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"a model of {name} needs the '{extra}' extra: pip install 'tmm-engine[{extra}]' ({error})"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks: what matters of them is an error here."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
