"""Descriptors: views are what they say, layers are found in any network, the choice is measured, files are whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.transforms.functional import gaussian_blur

from tests.digits import IMAGES, LABELS, make_classifier
from tmm_engine.index.columns import load_columns
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.descriptors import calibration
from tmm_engine.index.descriptors.calibration import CHANGES, FEWEST, calibrate, sample_size
from tmm_engine.index.descriptors.columns import (
    COPY_FEATURE,
    DESCRIPTORS,
    ROBUST_FEATURE,
    Describer,
    Descriptors,
    describer_of,
    descriptor_columns,
)
from tmm_engine.index.descriptors.descriptor import CONFIDENCE, FEATURES, LAYER_VIEWS, PROBABILITIES, Part
from tmm_engine.index.descriptors.layers import PIXEL_LAYER, Layer, Taps, find_layers, pooled
from tmm_engine.index.descriptors.projection import Projection
from tmm_engine.index.descriptors.views import MAX_VIEWS, blur, shifted, symmetric_views
from tmm_engine.index.errors import IndexStateError, InputError, ModelError
from tmm_engine.index.models.classifier import Classifier

N = 200
DIGITS = IMAGES[:N, None]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return make_classifier()


@pytest.fixture(scope="module")
def descriptors(classifier: Classifier) -> Descriptors:
    chosen = calibrate(DIGITS, LABELS[:N], classifier, queries=20)
    return Descriptors(chosen.recogniser, chosen.robust, 3, chosen.report)


# ----------------------------------------------------------------------------------------------- views


def test_the_first_view_is_the_stretched_image_and_all_differ():
    images = 0.5 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    views = list(symmetric_views(images, MAX_VIEWS))
    assert len(views) == MAX_VIEWS
    torch.testing.assert_close(views[0], stretch_contrast(images), rtol=0, atol=0)
    assert all(not torch.equal(a, b) for place, a in enumerate(views) for b in views[:place])
    assert all(view.shape == images.shape for view in views)


def test_darkening_changes_no_view():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for bright, dark in zip(symmetric_views(images, 4), symmetric_views(0.3 * images + 0.1, 4), strict=True):
        torch.testing.assert_close(bright, dark, rtol=0, atol=1e-5)


def test_views_of_small_images_are_moved_by_a_sixteenth_as_well():
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    _, _, moved, *_ = symmetric_views(image, 3)
    stretched = stretch_contrast(image)
    torch.testing.assert_close(moved, (stretched + shifted(stretched, 1, 0)) / 2)  # half a pixel


@pytest.mark.parametrize(("down", "right"), [(2, 0), (-2, 0), (0, 3), (0, -3), (1, -1), (0, 0)])
def test_a_shift_moves_pixels_and_repeats_the_edge(down: int, right: int):
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    rows, columns = (torch.arange(8) - down).clamp(0, 7), (torch.arange(8) - right).clamp(0, 7)
    assert torch.equal(shifted(image, down, right)[0, 0], image[0, 0][rows][:, columns])


@pytest.mark.parametrize(("height", "width", "sigma"), [(28, 28, 0.7), (33, 20, 2.0), (224, 160, 4.0), (5, 9, 3.0)])
def test_blur_is_torchvision_s(height: int, width: int, sigma: float):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    reach = min(round(2.5 * sigma), min(height, width) - 1)
    expected = gaussian_blur(images, [2 * reach + 1] * 2, [sigma] * 2)
    torch.testing.assert_close(blur(images, sigma), expected, rtol=0, atol=5e-6)


def test_blur_keeps_the_mean_of_a_flat_image_and_lessens_differences():
    image = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert blur(image, 1.0).std() < image.std()
    torch.testing.assert_close(blur(torch.full((1, 1, 16, 16), 0.3), 1.0), torch.full((1, 1, 16, 16), 0.3))
    assert blur(torch.ones(1, 1, 1, 1), 1.0).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("views", "confidence"), [(1, CONFIDENCE), (2, CONFIDENCE), (4, CONFIDENCE), (4, 0.0), (4, 1.0)]
)
def test_what_the_network_says_of_a_view_counts_by_its_confidence(
    classifier: Classifier, views: int, confidence: float
):
    """By hand: weights are exp(−confidence · entropy), over their sum."""
    taps = Taps(classifier, ())
    seen = [taps(view) for view in symmetric_views(torch.from_numpy(DIGITS[:9]) / 255.0, views)]
    mean = torch.full((seen[0].features.shape[1],), 0.1)
    found = Part(FEATURES, 1.0, mean, confidence=confidence)(seen, classifier.head)
    for row in range(9):
        probabilities = [classifier.head(view.features[row]).softmax(0) for view in seen]
        entropies = [-float((p * p.log()).nansum()) for p in probabilities]
        weights = np.exp(-confidence * np.array(entropies))
        units = [((view.features[row] - mean) / (view.features[row] - mean).norm()) for view in seen]
        expected = sum(float(w) * unit for w, unit in zip(weights / weights.sum(), units, strict=True))
        torch.testing.assert_close(found[row], expected / expected.norm(), rtol=0, atol=1e-5)


def test_layers_are_looked_at_in_the_image_and_its_blurred_copy(classifier: Classifier):
    layer = Layer("layer1", 2)
    taps = Taps(classifier, (layer,))
    seen = [taps(view) for view in symmetric_views(torch.from_numpy(DIGITS[:9]) / 255.0, 4)]
    part = Part(layer, 1.0, None)
    assert torch.equal(part(seen, classifier.head), part(seen[:LAYER_VIEWS], classifier.head))
    assert not torch.equal(part(seen[:1], classifier.head), part(seen[:LAYER_VIEWS], classifier.head))


# ---------------------------------------------------------------------------------------------- layers


def of(architecture: str, side: int = 32) -> Classifier:
    return Classifier.from_architecture(architecture, image_shape=(3, side, side), seed=0, num_classes=4)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("resnet18", ["relu", "layer1", "layer2", "layer3"]),
        ("vit_tiny_32", ["conv_proj", "encoder.layers.encoder_layer_1", "encoder"]),
        ("mobilenet_v3_small", ["features.0", "features.1", "features.3"]),
    ],
)
def test_layers_are_found_in_any_network(architecture: str, expected: list[str]):
    found = [layer.name for layer in find_layers(of(architecture))]
    assert set(expected) <= set(found)
    assert found.index(expected[0]) < found.index(expected[-1])
    assert len(found) == len(set(found)) <= 12


def test_a_network_without_maps_has_no_layers_and_pixels_serve():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    classifier = Classifier.from_module(model, image_shape=(1, 8, 8))
    assert find_layers(classifier) == []
    chosen = calibrate(DIGITS, LABELS[:N], classifier, queries=10)
    assert chosen.report["recogniser"] == "pixels:8x8"
    assert {FEATURES, PROBABILITIES} <= {part.source for part in chosen.robust.parts}


def test_taps_see_what_the_module_gives(classifier: Classifier):
    images, layer = torch.from_numpy(DIGITS[:5]).float() / 255, Layer("layer1", 2)
    seen = []
    network = classifier.backbone.get_submodule("network")
    with torch.no_grad():
        hook = network.get_submodule("layer1").register_forward_hook(lambda *found: seen.append(found[2]))
        features = classifier.features(images)
        hook.remove()
        taps = Taps(classifier, [layer, PIXEL_LAYER])
        found = taps(images)
    torch.testing.assert_close(found.features, features)
    height = seen[0].shape[-1] // 2
    cell = seen[0][:, :, :height, :height].mean((2, 3))
    torch.testing.assert_close(found.layers[layer].reshape(5, -1, 2, 2)[:, :, 0, 0], cell, rtol=1e-4, atol=1e-5)
    assert found.layers[PIXEL_LAYER].shape == (5, 64)
    assert not network.get_submodule("layer1")._forward_hooks  # the user's network has none of ours


def test_pooling_takes_maps_and_tokens():
    maps = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    expected = pooled(maps, 2)
    assert torch.equal(pooled(tokens, 2), expected)
    assert torch.equal(pooled(torch.cat([torch.ones(2, 1, 3), tokens], 1), 2), expected)  # a class token
    assert torch.equal(pooled(maps.permute(0, 2, 3, 1), 2), expected)  # channels last
    assert torch.equal(pooled(tokens[:, :7], 2), tokens[:, :7].mean(1))  # no square


@pytest.mark.parametrize(("height", "width"), [(8, 4), (4, 8), (7, 5), (6, 6)])
@pytest.mark.parametrize("channels", [8, 12])
def test_the_images_shape_tells_the_axes_of_maps_that_are_no_square(height: int, width: int, channels: int):
    maps = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    aspect = 16 * height / (16 * width - 3)  # of images whose sides the map's strides do not divide
    expected = adaptive_avg_pool2d(maps, 2).flatten(1)
    tokens = maps.flatten(2).transpose(1, 2)
    for form in (maps, maps.permute(0, 2, 3, 1), tokens, torch.cat([torch.ones(2, 1, channels), tokens], 1)):
        torch.testing.assert_close(pooled(form, 2, aspect=aspect), expected)


@pytest.mark.parametrize("shape", [(16, 32, 64), (64, 128, 256), (3, 32, 320), (8, 64, 64)])
def test_maps_with_channels_first_are_taken_as_such_where_both_may_be(shape: tuple[int, int, int]):
    maps = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    expected = adaptive_avg_pool2d(maps, 4).flatten(1)
    torch.testing.assert_close(pooled(maps, 4, aspect=shape[1] / shape[2]), expected)


@pytest.mark.parametrize(("count", "aspect", "cells"), [(8, 1 / 8, 8), (9, 1 / 8, 8), (8, 8.0, 8), (9, 8.0, 8)])
def test_tokens_of_a_single_row_or_column_keep_all_but_a_class_token(count: int, aspect: float, cells: int):
    tokens = torch.rand(2, count, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pooled(tokens, 1, aspect=aspect), tokens[:, count - cells :].mean(1))


class Shared(nn.Module):
    """One ReLU for maps and for rows."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.relu, self.rows, self.head = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.relu(self.rows(self.relu(self.maps(images)).mean((2, 3)))))


def test_a_module_that_gives_rows_as_well_is_no_layer_and_pixels_are_images():
    shared = Classifier.from_module(Shared(), image_shape=(1, 8, 64))
    assert [layer.name for layer in find_layers(shared)] == ["maps"]
    wide = torch.rand(2, 1, 8, 64, generator=torch.Generator().manual_seed(0))
    found = Taps(shared, [PIXEL_LAYER])(wide).layers[PIXEL_LAYER]
    torch.testing.assert_close(found, adaptive_avg_pool2d(wide, 8).flatten(1))
    assert calibrate(np.repeat(DIGITS[:60], 8, axis=3), None, shared, queries=20).recogniser.layers


class Odd(nn.Module):
    """Two convolutions, and beside them modules whose outputs say nothing, or have no row for each image."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
            self.adapter, self.tiles = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)
            self.positions, self.unused, self.head = nn.Identity(), nn.Conv2d(8, 8, 3), nn.Linear(16, 10)
        nn.init.zeros_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)
        self.register_buffer("place", torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.first(images).relu()
        maps = maps + self.adapter(maps) + 0.01 * self.positions(self.place)
        quarters = torch.cat([half for row in maps.chunk(2, 2) for half in row.chunk(2, 3)])
        tiles = self.tiles(quarters).mean((1, 2, 3)).unflatten(0, (4, -1)).sum(0)
        return self.head(self.second(maps).relu().mean((2, 3)) + 0.01 * tiles[:, None])


@pytest.fixture(scope="module")
def odd() -> Classifier:
    return Classifier.from_module(Odd(), image_shape=(1, 8, 8))


def test_modules_without_a_row_for_each_image_are_no_layers(odd: Classifier):
    assert {layer.name for layer in find_layers(odd)} <= {"first", "second", "adapter"}
    for name in ("positions", "tiles"):
        with pytest.raises(ModelError, match=f"{name}.*: expected a map .* of n = 3, got"):
            Taps(odd, [Layer(name)])
    with pytest.raises(ModelError, match=r"unused.*: expected a module that the network calls, got one that it never"):
        Taps(odd, [Layer("unused")])


def test_a_layer_that_says_nothing_is_not_chosen(odd: Classifier):
    """Its similarities are all alike: every exemplar would be the nearest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "find_layers", lambda _: [Layer("adapter"), Layer("second")])
        found = calibrate(DIGITS[:120], None, odd, queries=40)
    measured = {each["layer"]: each["mrr"] for each in found.report["recognisers"]}
    assert measured["adapter:4x4"] < 0.05 < measured["second:4x4"]
    assert found.report["recogniser"] != "adapter:4x4"


@pytest.mark.parametrize("text", ["layer2", "layer2:4x4", " layer2:4x4 "])
def test_a_layer_is_read_from_its_text(text: str):
    assert Layer.parse(text) == Layer("layer2", 4)
    assert Layer.parse("pixels") == PIXEL_LAYER
    assert str(Layer.parse("a.b:2x2")) == "a.b:2x2"


@pytest.mark.parametrize("text", ["", "layer2:", "layer2:4", "layer2:4x3", "layer2:0x0", "layer2:99x99", "a b"])
def test_other_texts_are_no_layers(text: str):
    with pytest.raises(InputError, match="expected a layer such as 'layer2'"):
        Layer.parse(text)


def test_a_layer_that_is_not_there_is_named_with_the_nearest(classifier: Classifier):
    with pytest.raises(
        InputError, match=r"no layer 'layr2' \(did you mean 'layer2'\?\); some that it has: .*layer1:4x4"
    ):
        Taps(classifier, [Layer("layr2")])
    with pytest.raises(ModelError, match=r"avgpool.* expected a map|expected a map"):
        Taps(classifier, [Layer("fc")])


# ------------------------------------------------------------------------------------------ projection


def test_a_whitening_projection_has_equal_variances_and_a_rotation_keeps_distances():
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(400, 6, generator=generator) * torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])
    white = (sample - sample.mean(0)) @ Projection.fit(sample, power=0.5).matrix
    spread = white.std(0)
    assert spread.max() / spread[:4].min() < 1.1
    rotated = (sample - sample.mean(0)) @ Projection.fit(sample, power=0.0).matrix
    torch.testing.assert_close(torch.cdist(rotated, rotated), torch.cdist(sample, sample), rtol=1e-3, atol=0.02)
    assert Projection.fit(sample, power=0.5, dimensions=2).matrix.shape == (6, 2)


@pytest.mark.parametrize("shape", [(60, 9), (9, 60)])
def test_its_components_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]):
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = sample * torch.linspace(1, 4, shape[1], dtype=torch.float64)
    found = Projection.fit(sample, power=0.0)
    _, singular, components = torch.linalg.svd(sample - sample.mean(0), full_matrices=False)
    rank = int((singular > 1e-9).sum())
    assert found.matrix.shape == (shape[1], rank)
    alignment = (found.matrix.double() * components[:rank].T).sum(0).abs()
    torch.testing.assert_close(alignment, torch.ones(rank, dtype=torch.float64), rtol=1e-5, atol=0)


def test_constant_samples_do_not_break_it():
    found = Projection.fit(torch.ones(10, 4), power=0.5)(torch.ones(3, 4))
    assert found.isfinite().all()


# ----------------------------------------------------------------------------------------- calibration


def test_the_report_says_how_it_was_chosen(descriptors: Descriptors):
    report = descriptors.report
    assert report["sample"] == N
    assert report["changes"] == list(CHANGES)
    found = {each["layer"]: each["mrr"] for each in report["recognisers"]}
    assert {"layer1:4x4", "layer2:4x4", "pixels:8x8"} <= set(found)
    assert all(0.0 < mrr <= 1.0 for mrr in found.values())
    assert found[report["recogniser"]] >= max(found.values()) - 0.01
    assert len(report["mixtures"]) > 6
    plain, *mixtures = report["mixtures"]
    assert plain["features"] == 1.0
    assert max(each["overlap"] for each in mixtures) > plain["overlap"]


def test_a_recogniser_can_be_asked_for(classifier: Classifier):
    chosen = calibrate(DIGITS, None, classifier, queries=10, recogniser=Layer("layer1", 2))
    assert chosen.report["recogniser"] == "layer1:2x2"


def test_few_images_have_the_documented_default(classifier: Classifier):
    chosen = calibrate(DIGITS[: FEWEST - 1], None, classifier, queries=10)
    assert chosen.report["changed"] == 0
    assert chosen.report["recognisers"] == chosen.report["mixtures"] == []
    assert chosen.recogniser.parts[0].projection is None


def test_constant_images_do_not_break_it(classifier: Classifier):
    flat = np.full((60, 1, 8, 8), 90, dtype=np.uint8)
    chosen = calibrate(flat, None, classifier, queries=5)
    describer = Describer(Descriptors(chosen.recogniser, chosen.robust, 2, chosen.report), classifier)
    for column in descriptor_columns(describer, classifier):
        assert np.isfinite(column.compute(flat)).all()


@pytest.mark.parametrize("exemplars", [1, 60, 200, 2000, 60_000, 1_000_000])
@pytest.mark.parametrize("views", [1, 5, 10])
def test_measuring_takes_a_tenth_of_building_at_most(exemplars: int, views: int):
    looked_at, changed = sample_size(exemplars, views)
    assert 1 <= changed <= looked_at <= exemplars
    passes = min(views, LAYER_VIEWS) * (looked_at + len(CHANGES) * changed)
    assert passes <= (1 + views) * max(200, 0.1 * exemplars) + len(CHANGES) * LAYER_VIEWS


# --------------------------------------------------------------------------------------------- columns


def test_columns_are_unit_vectors_and_survive_the_disk(
    descriptors: Descriptors, classifier: Classifier, tmp_path: Path
):
    columns = descriptor_columns(Describer(descriptors, classifier), classifier)
    for column in columns:
        column.save(tmp_path)
    loaded = load_columns(tmp_path, [COPY_FEATURE, ROBUST_FEATURE], classifier)
    assert loaded[0].describer is loaded[1].describer  # one pass for both
    for before, after in zip(columns, loaded, strict=True):
        found = before.compute(DIGITS[:30])
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
        assert found.shape == (30, before.dimension)
        np.testing.assert_allclose(after.compute(DIGITS[:30]), found, rtol=0, atol=1e-6)
    assert Descriptors.load(tmp_path / DESCRIPTORS, device=torch.device("cpu")).report == descriptors.report


def test_both_columns_take_one_pass_a_view(descriptors: Descriptors, classifier: Classifier):
    describer = Describer(descriptors, classifier)
    passed = []
    describer.classifier.backbone.register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
    columns = descriptor_columns(describer, classifier)
    images = DIGITS[:7].copy()
    for column in columns:
        column.compute(images)
    assert sum(passed) == 7 * descriptors.views


def test_one_image_and_many_are_described_alike(descriptors: Descriptors, classifier: Classifier):
    describer = Describer(descriptors, classifier)
    pixels = torch.from_numpy(DIGITS[:9]).float() / 255
    with torch.inference_mode():
        many = describer.described(describer.views(pixels), descriptors.robust)
        one = describer.described(describer.views(pixels[4:5]), descriptors.robust)
    np.testing.assert_allclose(one[0], many[4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "missing", "views", "order", "confidence", "source", "weight"])
def test_damaged_descriptors_are_refused(descriptors: Descriptors, tmp_path: Path, damage: str):
    path = tmp_path / DESCRIPTORS
    descriptors.save(path)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-5])
    elif damage == "views":
        path.write_bytes(content.replace(b'\\"views\\": 3', b'\\"views\\": 0'))
    elif damage == "order":  # as of a version that made its views in another
        assert content.count(b"[0, 0, true]") == 1
        path.write_bytes(content.replace(b"[0, 0, true]", b"[1, 0, true]"))
    elif damage == "confidence":  # likewise
        path.write_bytes(content.replace(b'\\"confidence\\": 4.0', b'\\"confidence\\": 0.0'))
    elif damage == "weight":
        path.write_bytes(content.replace(b'\\"weight\\": 4.0', b'\\"weight\\": -4.'))
    else:
        path.write_bytes(content.replace(b'\\"features\\"', b'\\"feat:res\\"'))
    former = "descriptors of another version" if damage in ("order", "confidence") else "damaged descriptors"
    with pytest.raises(IndexStateError, match=f"{former}.*build the index again"):
        Descriptors.load(path, device=torch.device("cpu"))


def test_descriptors_of_another_network_are_refused(descriptors: Descriptors, classifier: Classifier, tmp_path: Path):
    part = descriptors.recogniser.parts[0]
    assert part.mean is not None
    narrower = replace(part, mean=part.mean[:-1])
    other = replace(descriptors, recogniser=replace(descriptors.recogniser, parts=(narrower,)))
    wide = len(part.mean)
    with pytest.raises(InputError, match=rf"{part.source} gives {wide} numbers, not {wide - 1}"):
        Describer(other, classifier)
    other.save(tmp_path / DESCRIPTORS)
    with pytest.raises(IndexStateError, match=rf"{DESCRIPTORS}: .* not {wide - 1}; build the index again"):
        describer_of(tmp_path, make_classifier())


def test_how_much_a_view_counts_is_kept_with_the_descriptors(descriptors: Descriptors, tmp_path: Path):
    parts = tuple(replace(part, confidence=1.5) for part in descriptors.robust.parts)
    replace(descriptors, robust=replace(descriptors.robust, parts=parts)).save(tmp_path / DESCRIPTORS)
    loaded = Descriptors.load(tmp_path / DESCRIPTORS, device=torch.device("cpu"))
    assert {part.confidence for part in loaded.robust.parts} == {1.5}
    assert {part.confidence for part in loaded.recogniser.parts} == {CONFIDENCE}
