"""The ablation: what is varied, that it is one thing at a time, and that every number is of the same queries."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders import tiny_arrays, tiny_classifier
from tests.digits import IMAGES, LABELS, make_classifier
from tmm_engine.bench.benchmarks.ablation import (
    LAYERS,
    VALUES,
    ReferenceRetriever,
    beginning,
    layer_variants,
    measure_ablation,
    variants_of,
)
from tmm_engine.bench.methods import Method
from tmm_engine.bench.noise import Family, Perturbation
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.self_retrieval import KEY, measure_self_retrieval
from tmm_engine.bench.suite import Suite
from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.rerank.columns import STRETCHED_FEATURE
from tmm_engine.rerank.settings import PRESETS, canonical

QUICK = "paper,trigger_steps=2,tuning_min_steps=3,tuning_batch=8"
DARK = (Perturbation(Family.BRIGHTNESS, 0.5),)


@pytest.fixture(scope="module")
def suite() -> Suite:
    images, labels = tiny_arrays(1)
    return Suite.load(ArraySource(images, labels, name="tiny"), tiny_classifier(), exemplars=40)


@pytest.fixture(scope="module")
def digits() -> Suite:
    return Suite.load(ArraySource(IMAGES[:16, None], LABELS[:16], name="digits"), make_classifier(), exemplars=16)


def measure(path: Path, suite: Suite, variants: list, **options: int) -> list[dict]:
    with RecordFile.open(path, {"benchmark": "ablation"}, KEY, ("benchmark",)) as records:
        measure_ablation(suite, variants, DARK, records, **{"queries": 3, "k": 2, **options})
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


# --------------------------------------------------------------------------------------------- what is varied


@pytest.mark.parametrize("base", ["paper", "fast", "paper,tuning=discriminant,trigger=patch", QUICK])
def test_one_setting_differs_from_the_base(base: str):
    first, *others = variants_of(Method.parse(base), None, exemplars=600)
    assert (first.setting, first.value, first.method.name) == ("base", base, base)
    assert len({variant.method.name for variant in others} | {base}) == len(others) + 1
    assert first.method.config is not None
    for variant in others:
        config = variant.method.config
        assert config is not None
        now, base = config.to_json(), first.method.config.to_json()
        differing = {name for name in now.keys() & base.keys() if now[name] != base[name]}
        if variant.setting == "exemplars":
            assert (differing, variant.exemplars) == (set(), variant.value)
        else:
            assert differing - {"head.min_steps"} == {canonical(variant.setting)}
            value = now[canonical(variant.setting)]
            assert variant.value == ("none" if value is None else value)
    assert [variant.value for variant in others if variant.setting == "exemplars"] == [250, 500]


def test_every_value_is_there_or_the_bases():
    for base in map(Method.parse, PRESETS):
        assert base.config is not None
        found = variants_of(base, None, exemplars=10_000)
        for setting, values in VALUES.items():
            count = sum(variant.setting == setting for variant in found)
            felt = setting == "exemplars" or canonical(setting) in base.config.to_json()
            assert count in ((len(values) - 1, len(values)) if felt else (0,))


def test_epochs_bring_their_steps():
    found = {v.value: v.method.config for v in variants_of(Method.parse("paper"), ["tuning_epochs"], exemplars=9)}
    steps = {epochs: config.head.min_steps for epochs, config in found.items() if config and epochs != "paper"}
    assert steps == {2: 470, 5: 1175, 10: 2350}


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        ("cosine", None, "expected a preset"),
        ("paper", ["blnd"], "unknown setting 'blnd' \\(did you mean 'blend'\\?\\)"),
        ("paper", ["shrinkage"], "head.shrinkage has no effect with head=adam: leave it out, or add head=discriminant"),
        ("fast", ["blend", "ewc_lambda"], "head.ewc_lambda has no effect with head=discriminant"),
    ],
)
def test_what_cannot_be_varied_is_refused(base: str, settings: list[str] | None, message: str):
    with pytest.raises(InputError, match=message):
        variants_of(Method.parse(base), settings, exemplars=10)


# --------------------------------------------------------------------------------------------- what is measured


def test_smaller_sets_are_nested_and_keep_their_queries(suite: Suite):
    few, many = beginning(suite, 7), beginning(suite, 40)
    assert many.store.ids[:7].tolist() == few.store.ids.tolist()
    assert few.store.ids[few.queries(5)].tolist() == suite.store.ids[suite.queries(5)].tolist()
    rows = {id_: row for row, id_ in enumerate(suite.store.ids)}
    same = np.array([rows[id_] for id_ in few.store.ids])
    for part, whole in (
        (few.store.images(np.arange(7)), suite.store.images(same)),
        (few.store.features(np.arange(7)), suite.store.features(same)),
        (
            few.store.features(np.arange(7), column=STRETCHED_FEATURE),
            suite.store.features(same, column=STRETCHED_FEATURE),
        ),
        (few.store.labels, suite.store.labels[same]),
    ):
        np.testing.assert_array_equal(part, whole)


def test_records_are_of_every_variant_and_those_of_plain_self_retrieval(suite: Suite, tmp_path: Path):
    variants = variants_of(Method.parse(QUICK), ["trigger", "score", "tuning"], exemplars=40)
    found = measure(tmp_path / "a.jsonl", suite, variants)
    assert len(found) == 3 * 2 * len(variants)
    told = {record["method"]: (record["setting"], record["value"]) for record in found}
    assert told == {variant.method.name: (variant.setting, variant.value) for variant in variants}
    part = beginning(suite, 40)
    plain = {}
    for variant in variants:  # one by one, sharing nothing
        with RecordFile.open(tmp_path / f"{len(plain)}.jsonl", {"benchmark": "r"}, KEY, ()) as records:
            retrievers, queries = part.retrievers([variant.method]), part.queries(3)
            measure_self_retrieval(retrievers, queries, part.store, DARK, records, classifier=suite.classifier, k=2)
        lines = (tmp_path / f"{len(plain)}.jsonl").read_text().splitlines()[1:]
        plain[variant.method.name] = [json.loads(line) for line in lines]
    for name, expected in plain.items():
        own = [record for record in found if record["method"] == name]
        assert [{n: v for n, v in record.items() if n not in ("setting", "value")} for record in own] == expected


def test_fewer_exemplars_are_searched_with_the_same_queries(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(VALUES, "exemplars", ("6", "20"))
    variants = variants_of(Method.parse(QUICK), ["exemplars"], exemplars=40)
    found = measure(tmp_path / "a.jsonl", suite, variants)
    by_size = {size: [r for r in found if r["value"] == size] for size in (6, 20, QUICK)}
    for size, records in by_size.items():
        assert [record["query"] for record in records] == [record["query"] for record in by_size[QUICK]]
        assert max(record["rank"] for record in records) < (size if isinstance(size, int) else 40)
    alone = measure(tmp_path / "b.jsonl", beginning(suite, 6), [variants[0]])
    assert [record["rank"] for record in by_size[6]] == [record["rank"] for record in alone]
    for wrong in ({"queries": 7}, {"k": 6}):
        with pytest.raises(InputError, match="the smallest set has 6 exemplars"):
            measure(tmp_path / "c.jsonl", suite, variants, **wrong)


def test_a_rerun_adds_nothing_and_new_settings_are_added(suite: Suite, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    first = measure(path, suite, variants_of(Method.parse(QUICK), ["score"], exemplars=40))
    assert measure(path, suite, variants_of(Method.parse(QUICK), ["score"], exemplars=40)) == first
    more = measure(path, suite, variants_of(Method.parse(QUICK), ["score", "clamp"], exemplars=40))
    assert more[: len(first)] == first
    assert {record["setting"] for record in more[len(first) :]} == {"clamp"}


# --------------------------------------------------------------------------------------------- layers


def test_layers_are_the_head_and_each_block(digits: Suite, tmp_path: Path):
    variants = layer_variants(Method.parse(QUICK), digits.classifier)
    assert [variant.value for variant in variants] == ["head", *(f"head + {layer}" for layer in LAYERS)]
    before = {name: value.clone() for name, value in digits.classifier.backbone.state_dict().items()}
    found = measure(tmp_path / "a.jsonl", digits, [variants[0], variants[4]], queries=1)
    assert [(record["setting"], record["value"]) for record in found] == 2 * [
        ("layers", "head"),
        ("layers", "head + layer4"),
    ]
    assert all(torch.equal(value, before[name]) for name, value in digits.classifier.backbone.state_dict().items())


def test_the_head_alone_is_the_fast_path_and_layers_change_it(digits: Suite):
    method = Method.parse(f"{QUICK},tuning_lr=0.01")
    assert method.config is not None
    query = (IMAGES[100, None] / np.float32(255)).astype(np.float32)
    [fast] = digits.retrievers([method])
    head, deeper = (
        ReferenceRetriever("slow", method.config, layers, digits).scores(query) for layers in ((), ("network.layer4",))
    )
    np.testing.assert_allclose(head, fast.scores(query), atol=5e-3)
    assert np.abs(deeper - head).max() > 0.05


def test_layers_are_tuned_with_the_seed_that_the_base_asks_for(digits: Suite):
    """A seed of the configuration counts like one that a search adds; it does not raise "no effect"."""
    [first, *_] = layer_variants(Method.parse(f"{QUICK},seed=5"), digits.classifier)
    config, plain = first.method.config, Method.parse(QUICK).config
    assert config is not None and plain is not None and first.layers is not None
    query = (IMAGES[100, None] / np.float32(255)).astype(np.float32)
    own = ReferenceRetriever("five", config, first.layers, digits).scores(query)
    zero = ReferenceRetriever("zero", plain, first.layers, digits)
    np.testing.assert_array_equal(own, zero.scores(query, seed=5))
    assert not np.array_equal(own, zero.scores(query))


def test_the_reference_is_attacked_by_its_features(digits: Suite):
    method = Method.parse(QUICK)
    assert method.config is not None
    pixels = torch.tensor(IMAGES[100:102, None]) / 255.0
    embedded = ReferenceRetriever("slow", method.config, ("network.layer4",), digits).embedding(pixels)
    torch.testing.assert_close(embedded, digits.classifier.features(pixels))


def test_layers_need_a_resnet_and_what_the_reference_can_do(suite: Suite, digits: Suite):
    with pytest.raises(InputError, match="expected a model with layer1"):
        layer_variants(Method.parse("paper"), suite.classifier)
    for base in ("fast", "paper,fusion=1", "paper,tuning=discriminant", "paper,trigger=global"):
        with pytest.raises(InputError, match="slow reference"):
            layer_variants(Method.parse(base), digits.classifier)
