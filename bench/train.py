"""The paper's classifiers (§4.1): a torchvision architecture trained from nothing on a source of labelled images."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.architectures import ModelSpec, build_model
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import ImageRecord, ImageSource


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a classifier is trained: AdamW under a one-cycle schedule, cross-entropy.

    Attributes:
        architecture: A torchvision classification name, or ``vit_tiny_32``.
        small_stem: First convolution 3×3 with stride 1, for small images.
        epochs: Passes over the training images.
        batch: Images in a step.
        lr: The schedule's largest learning rate.
        weight_decay: AdamW's.
        shift: Training images are moved by up to so many pixels each way.
        flip: Half of the training images are mirrored: not for digits, nor for signs.
        seed: Of weights, order and augmentation.
    """

    architecture: str
    small_stem: bool = False
    epochs: int = 6
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    shift: int = 2
    flip: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """A source in memory: uint8 images (n, c, h, w) and their labels (n,)."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, "n"]
    class_names: tuple[str, ...]

    @classmethod
    def read(cls, source: ImageSource, *, progress: Progress = silent) -> "LabelledImages":
        """All readable images of a labelled source, at its natural shape.

        Raises:
            InputError: the source has no labels, or no image of it can be read.
        """
        if not source.labelled:
            raise InputError(f"{source.name}: expected labels to train with, got none (class folders have them)")
        images: list[UInt8[np.ndarray, "c h w"]] = []
        labels: list[int] = []
        for record in source.read(source.natural_shape()):
            if isinstance(record, ImageRecord) and record.label is not None:
                images.append(record.image)
                labels.append(record.label)
            progress("reading", len(images), len(source))
        if not images:
            raise InputError(f"{source.name}: no labelled image could be read")
        names = source.class_names or tuple(map(str, range(max(labels) + 1)))
        return cls(torch.from_numpy(np.stack(images)), torch.tensor(labels), tuple(names))

    def __len__(self) -> int:
        return len(self.images)


def train_classifier(
    data: LabelledImages, config: TrainConfig, *, device: torch.device, progress: Progress = silent
) -> Classifier:
    """Train, on a GPU in bf16, with the channels' means and deviations inside φ.

    On a CPU in float32: there PyTorch's bf16 gives NaN or garbage now and then as the weights' gradient of a
    convolution with stride 2 on a map of one cell, as in a ResNet with torchvision's stem on images of 16 pixels.

    Args:
        data: Training images.
        config: Architecture and schedule.
        device: Where to train.
        progress: Told of images passed.

    Raises:
        ModelError: the architecture is unknown or cannot take these images.
    """
    pixels = data.images.float() / 255
    _, channels, height, width = data.images.shape
    mean, std = (tuple(values.tolist()) for values in (pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))))
    spec = ModelSpec(
        architecture=config.architecture,
        num_classes=len(data.class_names),
        in_channels=channels,
        small_stem=config.small_stem,
        image_size=(height, width),
        mean=mean,
        std=std,
    )
    network = build_model(spec, seed=config.seed).to(device).to(memory_format=torch.channels_last).train()
    normalise = v2.Normalize(list(mean), list(std))
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(config.seed)  # v2 and dropout draw from the global generator only
        _fit(network, data, lambda images: normalise(images.to(device).float() / 255), config, progress)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in network.cpu().state_dict().items()}, weights)
        return Classifier.from_architecture(
            config.architecture,
            image_shape=spec.image_shape,
            weights=weights,
            small_stem=config.small_stem,
            mean=mean,
            std=std,
            class_names=data.class_names,
        )


def _fit(
    network: nn.Module,
    data: LabelledImages,
    normalised: Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n c h w"]],
    config: TrainConfig,
    progress: Progress,
) -> None:
    height, width = data.images.shape[2:]
    augment: list[v2.Transform] = [v2.RandomCrop((height, width), padding=config.shift, padding_mode="edge")]
    if config.flip:
        augment.append(v2.RandomHorizontalFlip())
    transform = v2.Compose(augment)
    batches = DataLoader(TensorDataset(data.images, data.labels), config.batch, shuffle=True, drop_last=True)
    optimiser = torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay)
    steps = config.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=max(steps, 1))
    device = next(network.parameters()).device
    for epoch in range(config.epochs):
        for step, (images, labels) in enumerate(batches):
            moved = torch.stack([transform(image) for image in images])  # each by itself
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
                logits = network(normalised(moved).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            progress("training", epoch * len(batches) + step + 1, steps)


def accuracy(classifier: Classifier, data: LabelledImages) -> float:
    """Share of images whose label the classifier predicts, in [0, 1]."""
    right = 0
    with torch.inference_mode():
        parts = forward_batch_size(classifier.image_shape)
        for images, labels in zip(data.images.split(parts), data.labels.split(parts), strict=True):
            pixels = images.to(classifier.device).float() / 255
            right += int((classifier.logits(classifier.features(pixels)).argmax(1).cpu() == labels).sum())
    return right / len(data)
