"""TMM-NN, slowly and literally: autograd through the whole model, batches drawn as images, a separate scoring pass.

The fast path is held to this by tests. Nothing is shared with it but the configuration, the order of the batches and
the blend's weights. It alone can also tune backbone layers beside the head (§4.8.2).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor, nn

from tmm_engine.index.models.classifier import Classifier
from tmm_engine.rerank.optimisation import INITIAL_STD, PATCH, PATIENCE, OwnTrigger
from tmm_engine.rerank.settings import ClosedForm, FixedPatch, IndexTrigger, QueryTrigger, Score, TmmConfig, TunedHead
from tmm_engine.rerank.tuning import exemplar_batches


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceResult:
    """scores: float (n,), of every exemplar, larger is better; trigger: (c, h, w); model: the tuned f', C+1 outputs."""

    scores: Float[np.ndarray, "n"]
    trigger: Float[Tensor, "c h w"]
    model: nn.Module


def reference_scores(
    classifier: Classifier,
    query: Float[Tensor, "c h w"],
    images: UInt8[Tensor, "n c h w"],
    labels: Int64[Tensor, "n"],
    config: TmmConfig,
    *,
    trigger: Float[Tensor, "c h w"] | None = None,
    tune_layers: tuple[str, ...] = (),
    batch_size: int = 256,
) -> ReferenceResult:
    """Algorithm 1 for one query against all exemplars.

    Args:
        classifier: f; copied, not modified.
        query: Pixels in [0, 1].
        images: The exemplars.
        labels: y_i.
        config: The reading of TMM-NN, with a `TunedHead`. `Sample` plays no part: all exemplars tune, all are scored.
        trigger: τ, where it is known already.
        tune_layers: Names of modules of `classifier.backbone` that are tuned with the head, such as "network.layer4".
        batch_size: Images in a forward pass of the scoring.
    """
    assert isinstance(config.head, TunedHead)
    settings = config.head
    old = LiteralModel(classifier.backbone, classifier.head)
    exemplars, labels = images.to(query) / 255.0, labels.to(query.device)
    if config.view.stretch:
        query, exemplars = _stretched(query), torch.stack([_stretched(x) for x in exemplars])
    if trigger is None:
        trigger = _own_trigger(old, query, config)
    triggered = _blending(query, trigger, config)
    with torch.no_grad():
        query_label = old(query[None]).argmax(dim=1)
    new = _extended(old)
    tuned = [new.head, *(new.backbone.get_submodule(name) for name in tune_layers)]
    parameters = [parameter for module in tuned for parameter in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_()
    fisher = reference_fisher(old, exemplars)
    anchors = {"weight": old.head.weight.detach(), "bias": old.head.bias.detach()}
    optimiser = torch.optim.Adam(parameters, lr=settings.lr)
    dummy, classes = torch.tensor([old.head.out_features], device=query.device), old.head.out_features
    for batch in exemplar_batches(len(exemplars), settings, seed=config.seed):
        x, y = exemplars[batch], labels[batch]
        loss = F.cross_entropy(new(triggered(query)[None]), dummy)
        loss = loss + F.cross_entropy(new(query[None]), query_label)
        loss = loss + F.cross_entropy(new(triggered(x)), y) + F.cross_entropy(new(x), y)
        for name, anchor in anchors.items():
            drift = getattr(new.head, name)[:classes] - anchor
            loss = loss + settings.ewc_lambda / 2 * (fisher[name] * drift**2).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    scores = []
    with torch.no_grad():
        for x in exemplars.split(batch_size):
            z = new(triggered(x))
            scores.append(z[:, -1] if settings.score is Score.LOGIT else z[:, -1] - z[:, :-1].logsumexp(dim=1))
    return ReferenceResult(torch.cat(scores).cpu().numpy(), trigger, new)


def reference_discriminant_scores(
    classifier: Classifier,
    query: Float[Tensor, "c h w"],
    images: UInt8[Tensor, "n c h w"],
    config: TmmConfig,
    *,
    trigger: Float[Tensor, "c h w"] | None = None,
) -> Float64[np.ndarray, "n"]:
    """Scores by a `ClosedForm` head, fused with the cosine similarity of clean features where `Rank.fusion` > 0,
    and seen from the exemplar that the query may be a copy of where `Rank.recognition` is set.

    Image by image in float64; Σ^(−1/2) by eigenvectors in place of a Cholesky factor: the similarities are the same.

    Args:
        classifier: f; copied, not modified.
        query: Pixels in [0, 1].
        images: The exemplars: all of them are scored, and Σ is theirs.
        config: The reading of TMM-NN, with a `ClosedForm`.
        trigger: τ, where it is known already.
    """
    assert isinstance(config.head, ClosedForm)
    fusion, recognition = config.rank.fusion, config.rank.recognition
    model = LiteralModel(classifier.backbone, classifier.head)
    exemplars = [image.to(query) / 255.0 for image in images]
    if config.view.stretch:
        query, exemplars = _stretched(query), [_stretched(x) for x in exemplars]
    if trigger is None:
        trigger = _own_trigger(model, query, config)
    triggered = _blending(query, trigger, config)

    def phi(x: Float[Tensor, "c h w"]) -> Float64[np.ndarray, "d"]:
        with torch.no_grad():
            return model.backbone(x[None])[0].double().cpu().numpy()

    features = [phi(triggered(x)) for x in exemplars]
    mean = np.mean(features, axis=0)
    covariance = np.mean([np.outer(feature - mean, feature - mean) for feature in features], axis=0)
    covariance += config.head.shrinkage * (covariance.trace() / len(mean) or 1.0) * np.eye(len(mean))
    variances, axes = np.linalg.eigh(covariance)
    root = axes @ np.diag(variances**-0.5) @ axes.T  # Σ^(−1/2)
    clean = [phi(x) for x in exemplars]

    def similarities(positive: Float64[np.ndarray, "d"], query: Float64[np.ndarray, "d"]) -> list[tuple[float, float]]:
        decorrelated = [_cosine(root @ (positive - mean), root @ (feature - mean)) for feature in features]
        return list(zip(decorrelated, [_cosine(query, feature) for feature in clean], strict=True))

    positive, plain = phi(triggered(query)), phi(query)
    pairs = similarities(positive, plain)
    if recognition is not None and len(exemplars) > 1:
        matches = [max(s, 0.0) if fusion == 0 else (4.0 * max(s, 0.0) + c) / 5.0 for s, c in pairs]
        best = int(np.argmax(matches))
        nearest, second = np.sort(np.sqrt(np.maximum(1e-6, 1.0 - np.array(matches))))[:2]
        share = 1.0 / (1.0 + np.exp(-20.0 * (recognition - nearest / second) / recognition))
        positive = positive + share * (features[best] - positive)
        plain = plain + share * (clean[best] - plain)
        pairs = similarities(positive, plain)
    return np.array([s if fusion == 0 else max(s, 0.0) + fusion * c for s, c in pairs])


def reference_trigger(
    model: nn.Module, query: Float[Tensor, "c h w"], settings: OwnTrigger, *, seed: int = 0
) -> Float[Tensor, "c h w"]:
    """τ for one query: Adam on Eq. 8, in a plain loop."""
    mask = torch.ones_like(query)
    if not isinstance(settings, QueryTrigger):
        mask = torch.zeros_like(query)
        mask[:, :PATCH, :PATCH] = 1.0
    if isinstance(settings, FixedPatch):
        return mask
    noise = torch.randn(query.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tau = (INITIAL_STD * noise.to(query) * mask).requires_grad_()
    target = model(query[None]).detach()
    optimiser = torch.optim.Adam([tau], lr=settings.lr)
    best = tau.detach().clone()
    losses: list[float] = []
    for step in range(settings.steps + 1):
        loss = F.mse_loss(model((query + tau)[None]), target) + 1.0 / tau.norm() ** 2
        if not losses or loss.item() < min(losses):
            best = tau.detach().clone()
        losses.append(loss.item())
        if step == settings.steps:
            break
        if step >= PATIENCE:
            before, now = min(losses[:-PATIENCE]), min(losses)
            if before - now < settings.tolerance * before:
                break
        optimiser.zero_grad()
        loss.backward()
        assert tau.grad is not None
        tau.grad *= mask
        optimiser.step()
    return best


def _own_trigger(model: nn.Module, query: Float[Tensor, "c h w"], config: TmmConfig) -> Float[Tensor, "c h w"]:
    assert not isinstance(config.trigger, IndexTrigger), "the index's trigger has to be given"
    return reference_trigger(model, query, config.trigger, seed=config.seed)


def reference_fisher(model: nn.Module, exemplars: Float[Tensor, "n c h w"]) -> dict[str, Tensor]:
    """The head's Fisher diagonal by autograd: mean over exemplars of Σ_y p_y (∂ log p_y / ∂θ)², one gradient at a
    time.
    """
    head = model.get_submodule("head").requires_grad_()
    fisher = {name: torch.zeros_like(parameter) for name, parameter in head.named_parameters()}
    for x in exemplars:
        log_p = torch.log_softmax(model(x[None])[0], dim=0)
        for log_p_y in log_p:
            gradients = torch.autograd.grad(log_p_y, list(head.parameters()), retain_graph=True)
            for total, gradient in zip(fisher.values(), gradients, strict=True):
                total.add_(log_p_y.exp().detach() * gradient**2 / len(exemplars))
    head.requires_grad_(False)
    return fisher


def _stretched(image: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
    low, high = float(image.min()), float(image.max())
    return image if low == high else (image - low) / (high - low)


def _blending(
    query: Float[Tensor, "c h w"], trigger: Float[Tensor, "c h w"], config: TmmConfig
) -> Callable[[Float[Tensor, "*n c h w"]], Float[Tensor, "*n c h w"]]:
    """x ↦ x^t."""
    blending = config.blending
    omega = float(query.double().std(correction=0)) if blending.intensity is None else blending.intensity
    image_weight, trigger_weight = blending.weights(omega)

    def triggered(x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
        blended = x * image_weight + trigger * trigger_weight
        return blended.clamp(0.0, 1.0) if blending.clamp else blended

    return triggered


def _cosine(a: Float64[np.ndarray, "d"], b: Float64[np.ndarray, "d"]) -> float:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths > 0 else 0.0


class LiteralModel(nn.Module):
    """f = head ∘ backbone, from copies of both."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = copy.deepcopy(backbone), copy.deepcopy(head)
        if self.head.bias is None:  # the dummy class has one, so all have
            self.head.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]))
        self.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        return self.head(self.backbone(images))


def _extended(old: LiteralModel) -> LiteralModel:
    """f' before tuning: a copy of f whose head has one more, zero row."""
    rows, d = old.head.weight.shape
    extended = nn.Linear(d, rows + 1).to(old.head.weight)
    extended.weight.data = torch.cat([old.head.weight, torch.zeros(1, d).to(old.head.weight)])
    extended.bias.data = torch.cat([old.head.bias, torch.zeros(1).to(old.head.weight)])
    return LiteralModel(old.backbone, extended)
