"""What may be done to query and exemplar alike before a layer is looked at, beside symmetric views."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from tmm_engine.index.models.classifier import Classifier

OWN_SHARE = 1 / 17  # of an image's own statistics: one image beside a prior of 16 (Schneider et al., NeurIPS 2020)


def median_filtered(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The median of every 3×3 neighbourhood, edges mirrored: the mildest denoising there is."""
    windows = pad(images, (1, 1, 1, 1), mode="reflect").unfold(2, 3, 1).unfold(3, 3, 1)
    return windows.flatten(-2).median(dim=-1).values


class _OwnStatistics(nn.Module):
    """A batch normalisation whose mean and variance are in part those of the image itself."""

    def __init__(self, trained: nn.BatchNorm2d, share: float) -> None:
        super().__init__()
        self.trained, self.share = trained, share

    def forward(self, maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Normalised."""
        own_variance, own_mean = torch.var_mean(maps, dim=(2, 3), correction=0, keepdim=True)
        trained = self.trained
        assert trained.running_mean is not None and trained.running_var is not None  # of every classifier in eval mode
        mean = torch.lerp(trained.running_mean.view(-1, 1, 1), own_mean, self.share)
        variance = torch.lerp(trained.running_var.view(-1, 1, 1), own_variance, self.share)
        normalised = (maps - mean) * (variance + trained.eps).rsqrt()
        if trained.weight is None:
            return normalised
        return normalised * trained.weight.view(-1, 1, 1) + trained.bias.view(-1, 1, 1)


def with_own_statistics(classifier: Classifier, share: float = OWN_SHARE) -> Classifier | None:
    """A copy whose batch normalisations look at the image's own statistics too; None where there is none of them."""
    adapted = classifier.to(classifier.device)
    network = adapted.backbone.get_submodule("network")
    found = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    ]
    for name in found:
        trained = network.get_submodule(name)
        assert isinstance(trained, nn.BatchNorm2d)
        network.set_submodule(name, _OwnStatistics(trained, share))
    return adapted if found else None
