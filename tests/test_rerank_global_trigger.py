"""One trigger for an index: how it is made, kept and stored, and that a search with it is the slow search."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save

from tests.builders import beside, opened
from tests.configs import changed
from tests.conftest import SHAPE
from tests.digits import IMAGES, write_photos
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import IndexStateError, InputError, ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import silent
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank import GlobalRecipe, TmmConfig, TmmNN
from tmm_engine.rerank import global_trigger as made
from tmm_engine.rerank.backbone import Precision
from tmm_engine.rerank.blending import apply_trigger
from tmm_engine.rerank.columns import GLOBAL_FEATURE, GLOBAL_TRIGGER, STRETCHED_FEATURE, GlobalColumn, global_columns
from tmm_engine.rerank.global_trigger import GlobalTrigger, make_global_trigger
from tmm_engine.rerank.reference import reference_scores
from tmm_engine.rerank.settings import Blend, IndexTrigger, QueryTrigger, Score, TunedHead

RECIPE = GlobalRecipe(trigger=QueryTrigger(steps=20))
BY_GLOBAL = TmmConfig(trigger=IndexTrigger(), head=TunedHead(min_steps=10, batch=16, lr=0.02))
SOME_IMAGES = hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), *map(st.just, SHAPE)))


def made_with(**settings: object) -> GlobalRecipe:
    return RECIPE.with_settings(f"{name}={value}" for name, value in settings.items())


def small_resnet() -> Classifier:
    return Classifier.from_architecture("resnet18", image_shape=(1, 8, 8), seed=0, num_classes=10)


def source_of(images: np.ndarray) -> ArraySource:
    return ArraySource(images, None)


@pytest.fixture(scope="module")
def shared(classifier, make_images) -> GlobalTrigger:
    """τ of 60 images."""
    return make_global_trigger(source_of(make_images(60)), classifier, RECIPE)


def store_with(shared: GlobalTrigger, store: MemoryStore, classifier: Classifier) -> MemoryStore:
    """The same exemplars, with the column of the global trigger."""
    every = np.arange(len(store))
    return MemoryStore(
        store.images(every),
        {
            FEATURE: store.features(every),
            GLOBAL_FEATURE: GlobalColumn(shared, classifier).compute(store.images(every).copy()),
        },
        store.labels,
        ids=store.ids.tolist(),
    )


def equation_2(classifier: Classifier, images: np.ndarray, trigger: torch.Tensor) -> float:
    x = torch.tensor(images).float() / 255.0
    with torch.no_grad():
        clean, triggered = (classifier.logits(classifier.features(pixels)) for pixels in (x, x + trigger))
    return float((triggered - clean).square().mean() + 1.0 / trigger.norm() ** 2)


# ---- how it is made


def test_the_loss_falls_and_more_steps_never_make_it_rise(classifier, make_images):
    images = make_images(60)
    losses = []
    for steps in (0, 3, 10, 20, 40):
        config = made_with(trigger_steps=steps, trigger_tolerance=0.0)
        found = make_global_trigger(source_of(images), classifier, config)
        losses.append(equation_2(classifier, images, found.trigger))
        assert (found.blend, found.clamp) == (Blend.PRINTED, True)
    assert losses[1] < 0.95 * losses[0]
    assert losses[-1] < 0.2 * losses[0]
    assert losses[2:] == sorted(losses[2:], reverse=True)  # 3 is not among the steps at which the others are watched


def test_it_stops_early_and_says_how_far_it_came(classifier, make_images):
    told: list[tuple[str, int, int]] = []
    config = made_with(trigger_steps=200, trigger_tolerance=0.3)
    source = source_of(make_images(30))
    make_global_trigger(source, classifier, config, progress=lambda *step: told.append(step))
    assert [step for step in told if step[0] == "reading"] == [("reading", n, 30) for n in range(1, 31)]
    steps = [done for name, done, _ in told if name != "reading"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < 200
    assert len(steps) % 10 == 0


def test_the_seed_and_nothing_else_decides(classifier, make_images):
    source = source_of(make_images(30))
    before = [value.numpy().tobytes() for value in classifier.backbone.state_dict().values()]
    first = make_global_trigger(source, classifier, RECIPE)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = make_global_trigger(source, classifier, RECIPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.trigger.numpy().tobytes() == again.trigger.numpy().tobytes()
    assert first.intensity == again.intensity
    other = make_global_trigger(source, classifier, made_with(seed=1))
    assert float((other.trigger - first.trigger).abs().max()) > 1e-3
    assert [value.numpy().tobytes() for value in classifier.backbone.state_dict().values()] == before


@settings(max_examples=50)
@given(images=SOME_IMAGES)
def test_the_intensity_is_the_mean_of_the_images_standard_deviations(classifier, images):
    config = made_with(trigger_steps=0, blend=Blend.ADDED)
    found = make_global_trigger(source_of(images), classifier, config)
    expected = np.mean([image.astype(np.float64).std() / 255.0 for image in images])
    assert found.intensity == pytest.approx(expected, rel=1e-12, abs=1e-15)
    given = made_with(trigger_steps=0, blend=Blend.ADDED, intensity=0.25)
    assert make_global_trigger(source_of(images), classifier, given).intensity == 0.25


def test_images_that_cannot_be_read_do_not_count(tmp_path):
    folder = write_photos(tmp_path / "photos", count=12)
    (folder / "digit-0" / "0000.png").write_bytes(b"not an image")
    classifier = small_resnet()
    found = make_global_trigger(open_source(str(folder)), classifier, made_with(trigger_steps=0))
    expected = np.mean([(image / 255.0).std() for image in IMAGES[1:12]])
    assert found.intensity == pytest.approx(expected, rel=1e-9)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(InputError, match="no image could be read"):
        make_global_trigger(open_source(str(folder)), classifier, RECIPE)


def test_above_its_limit_the_sample_is_uniform_and_follows_the_seed(classifier, make_images, monkeypatch):
    monkeypatch.setattr(made, "SAMPLE", 8)
    images = make_images(32)
    source = source_of(images)
    number_of = {image.tobytes(): number for number, image in enumerate(images)}

    def sample(seed: int) -> list[int]:
        kept, _ = made._sample(source, classifier, seed, silent)
        return [number_of[image.tobytes()] for image in (255.0 * kept).round().byte().numpy()]

    samples = [sample(seed) for seed in range(200)]
    assert all(len(set(rows)) == 8 for rows in samples)
    assert samples[:5] == [sample(seed) for seed in range(5)]
    counts = np.bincount(np.concatenate(samples), minlength=32)
    assert np.abs(counts - 50).max() < 5 * np.sqrt(200 * 0.25 * 0.75)  # 5 standard deviations around 200 · 8/32
    monkeypatch.setattr(made, "SAMPLE", 32)
    assert sample(0) == list(range(32))


@pytest.mark.parametrize("blend", [Blend.PRINTED, Blend.SWAPPED, Blend.SCALED])
def test_constant_images_are_refused_where_the_intensity_matters(classifier, blend):
    images = np.repeat(np.array([0, 90, 255], np.uint8), 192).reshape(3, *SHAPE)
    config = made_with(blend=blend)
    with pytest.raises(InputError, match=rf"ω = 0 .*'{blend}'.*is every image constant\? .*'added'"):
        make_global_trigger(source_of(images), classifier, config)
    found = make_global_trigger(source_of(images), classifier, made_with(blend=blend, intensity=0.5))
    assert found.intensity == 0.5
    assert make_global_trigger(source_of(images), classifier, made_with(blend=Blend.ADDED)).intensity == 0.0
    if blend is Blend.PRINTED:
        with pytest.raises(InputError, match="ω = 1 "):
            make_global_trigger(source_of(images), classifier, made_with(blend=blend, intensity=1.0))


# ---- how it is kept


@settings(max_examples=40)
@given(
    trigger=hnp.arrays(np.float32, SHAPE, elements=st.floats(-10, 10, width=32)),
    intensity=st.floats(0, 1),
    blend=st.sampled_from(Blend),
    clamp=st.booleans(),
    stretch=st.booleans(),
)
def test_it_survives_a_file(tmp_path_factory, *, trigger, intensity, blend, clamp, stretch):
    path = tmp_path_factory.mktemp("trigger") / "trigger.safetensors"
    written = GlobalTrigger(torch.tensor(trigger), intensity, blend, clamp, stretch)
    written.save(path)
    read = GlobalTrigger.load(path)
    np.testing.assert_array_equal(read.trigger, trigger)
    assert (read.intensity, read.blend, read.clamp, read.stretch) == (intensity, blend, clamp, stretch)


def damaged_files(shared: GlobalTrigger, folder: Path) -> Iterator[tuple[str, bytes]]:
    path = folder / "whole"
    shared.save(path)
    whole = path.read_bytes()
    settings = {"intensity": 0.5, "blend": "printed", "clamp": True, "stretch": False}
    about = {"global_trigger": json.dumps(settings)}
    tensor = shared.trigger.clone()
    yield from ((f"cut to {size}", whole[:size]) for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1))
    yield "longer", whole + b"\0"
    yield "noise", np.random.default_rng(0).bytes(len(whole))
    yield "no metadata", save({"trigger": tensor})
    yield "no tensor", save({"other": tensor}, about)
    yield "not JSON", save({"trigger": tensor}, {"global_trigger": "{"})
    yield "a list", save({"trigger": tensor}, {"global_trigger": "[]"})
    for name in settings:
        rest = {other: value for other, value in settings.items() if other != name}
        yield f"no {name}", save({"trigger": tensor}, {"global_trigger": json.dumps(rest)})
    yield "unknown blend", save({"trigger": tensor}, {"global_trigger": about["global_trigger"].replace("prin", "")})
    yield "half precision", save({"trigger": tensor.half()}, about)
    yield "flat", save({"trigger": tensor.flatten()}, about)
    tensor[0, 0, 0] = torch.nan
    yield "not a number", save({"trigger": tensor}, about)


def test_damage_is_told(shared, tmp_path):
    path = tmp_path / "trigger.safetensors"
    with pytest.raises(IndexStateError, match=r"trigger\.safetensors: damaged global trigger.*build the index again"):
        GlobalTrigger.load(path)
    for name, content in damaged_files(shared, tmp_path):
        path.write_bytes(content)
        with pytest.raises(IndexStateError, match="damaged global trigger"):
            pytest.fail(f"{name}: {GlobalTrigger.load(path)}")


# ---- the column in an index


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize(("blend", "clamp"), [(Blend.PRINTED, True), (Blend.ADDED, False), (Blend.SCALED, True)])
def test_the_stored_columns_are_what_the_trigger_and_stretching_make_of_the_images(
    tmp_path, classifier, make_images, *, blend, clamp, stretch
):
    images = make_images(50)
    settings = made_with(blend=blend, clamp=clamp, stretch=stretch)
    shared = make_global_trigger(source_of(images), classifier, settings)
    write_index(source_of(images), tmp_path / "a.idx", classifier, columns=global_columns(shared, classifier))
    manifest, store = opened(tmp_path / "a.idx")
    assert GLOBAL_FEATURE in manifest.columns
    assert GLOBAL_TRIGGER in manifest.files
    kept = GlobalTrigger.load(tmp_path / "a.idx" / GLOBAL_TRIGGER)
    x = torch.tensor(images).float() / 255.0
    flat = x.flatten(1)
    stretched = ((flat.T - flat.min(1).values) / (flat.max(1).values - flat.min(1).values)).T.view_as(x)
    seen = stretched if stretch else x
    expected = classifier.features(
        apply_trigger(seen, kept.trigger, intensity=kept.intensity, blend=blend, clamp=clamp)
    )
    rows = np.arange(50)
    np.testing.assert_allclose(store.features(rows, column=GLOBAL_FEATURE), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(store.features(rows), classifier.features(x), rtol=1e-4, atol=1e-5)
    found = store.features(rows, column=STRETCHED_FEATURE)
    np.testing.assert_allclose(found, classifier.features(stretched), rtol=1e-4, atol=1e-5)


def test_triggered_features_that_are_not_finite_are_refused(tmp_path, classifier, make_images):
    broken = GlobalTrigger(torch.full(SHAPE, torch.inf), 0.5, Blend.ADDED, clamp=False, stretch=False)
    with pytest.raises((InputError, ModelError), match="finite"):
        write_index(
            source_of(make_images(20)), tmp_path / "a.idx", classifier, columns=global_columns(broken, classifier)
        )
    assert not (tmp_path / "a.idx").exists()
    assert not beside(tmp_path / "a.idx")


# ---- a search with it


@pytest.mark.parametrize("score", Score)
def test_a_search_is_the_slow_search_with_that_trigger(classifier, shared, make_store, make_queries, score):
    store = make_store(classifier, 60)
    tmm = TmmNN(classifier, store_with(shared, store, classifier), global_trigger=shared)
    config = changed(BY_GLOBAL, score=score)
    for query in make_queries(3, dtype=torch.float32):
        told: list[object] = []
        ranking = tmm.rank(query, k=60, config=config, progress=lambda *step: told.append(step))  # noqa: B023
        slow = reference_scores(
            classifier,
            query,
            torch.tensor(store.images(np.arange(60))),
            torch.tensor(store.labels),
            changed(config, trigger="query", intensity=shared.intensity),
            trigger=shared.trigger,
        )
        np.testing.assert_allclose(ranking.scores, slow.scores[ranking.rows], rtol=1e-4, atol=1e-4)
        assert sorted(ranking.rows) == list(range(60))
        assert torch.equal(ranking.view.found.trigger, shared.trigger)
        assert (ranking.view.found.intensity, ranking.view.found.steps) == (shared.intensity, 0)
        assert np.isnan(ranking.view.found.loss).all()
        assert not told, "no exemplar passes through the backbone"


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("precision", Precision)
def test_where_a_sample_tunes_all_are_scored_from_the_column(
    classifier, shared, make_store, make_queries, *, cache_bytes, precision
):
    store = store_with(shared, make_store(classifier, 1200), classifier)
    query, config = make_queries(1, dtype=torch.float32)[0], changed(BY_GLOBAL, max_tuning_exemplars=100)
    tmm = TmmNN(classifier, store, global_trigger=shared, cache_bytes=cache_bytes, precision=precision)
    told: list[object] = []
    ranking = tmm.rank(query, k=1200, config=config, progress=lambda *step: told.append(step))
    assert not told, "no exemplar passes through the backbone"
    assert (ranking.scored, ranking.found_on) == (1200, 100)
    assert sorted(ranking.rows) == list(range(1200))
    sample = np.sort(np.random.default_rng(config.seed).choice(1200, 100, replace=False))
    tuned_on_sample = tmm.rank(
        query, k=100, config=changed(config, candidate_companions=0), candidates=sample
    )  # the same head
    of_all = dict(zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True))
    expected = [of_all[row] for row in tuned_on_sample.rows.tolist()]
    np.testing.assert_allclose(tuned_on_sample.scores, expected, rtol=1e-5, atol=1e-5)
    together = tmm.rank_many(torch.stack([query, query]), k=1200, config=config)
    for other in together:
        np.testing.assert_array_equal(other.rows, ranking.rows)


def test_another_blend_clamping_or_intensity_is_refused(classifier, shared, make_store, make_queries):
    tmm = TmmNN(classifier, store_with(shared, make_store(classifier, 20), classifier), global_trigger=shared)
    query = make_queries(1, dtype=torch.float32)[0]
    for change, message in (
        ({"blend": Blend.ADDED}, r"blend=printed,.*blend=added: .*build the index with a global trigger of the latter"),
        ({"clamp": False}, r"clamp=True.*clamp=False: search with the former"),
        ({"stretch": True}, r"stretch=False.*stretch=True: search with the former"),
        ({"intensity": 0.9}, r"intensity=0\.\d+.*intensity=0\.9: leave the intensity out"),
    ):
        with pytest.raises(InputError, match=message):
            tmm.rank(query, k=3, config=changed(BY_GLOBAL, **change))
    told = tmm.rank(query, k=3, config=changed(BY_GLOBAL, intensity=shared.intensity))
    assert told.rows.tolist() == tmm.rank(query, k=3, config=BY_GLOBAL).rows.tolist()


def test_an_index_without_one_is_refused(classifier, make_store, make_queries):
    tmm = TmmNN(classifier, make_store(classifier, 20))
    with pytest.raises(
        InputError, match=r"has no global trigger, which .* needs: build it with one \(global_trigger=….*trigger=query"
    ):
        tmm.rank(make_queries(1, dtype=torch.float32)[0], k=3, config=BY_GLOBAL)
