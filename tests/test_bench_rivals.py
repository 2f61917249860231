"""The rivals of mode robust: each is what its name says, all see the same queries, and none is told the answer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.digits import IMAGES, LABELS, make_classifier
from tmm_engine.bench.benchmark import Run
from tmm_engine.bench.benchmarks.rivals import GROUPS, _group, _parse_presets, _trade, among
from tmm_engine.bench.benchmarks.unseen import KEY as UNSEEN_KEY
from tmm_engine.bench.benchmarks.unseen import measure_unseen
from tmm_engine.bench.loading import HeldOut
from tmm_engine.bench.methods import Method
from tmm_engine.bench.noise import parse
from tmm_engine.bench.records import RecordFile, read_records
from tmm_engine.bench.report import write_report
from tmm_engine.bench.retrievers import Recogniser, TmmRetriever
from tmm_engine.bench.rivals.hashes import HASHES, hashed
from tmm_engine.bench.rivals.images import median_filtered, with_own_statistics
from tmm_engine.bench.rivals.keeping import vectors_of
from tmm_engine.bench.rivals.measuring import KEY, UNSEEN, VERY_IMAGE, measure_presets, measure_rivals
from tmm_engine.bench.rivals.parts import RECOGNISER, Part, Passes
from tmm_engine.bench.rivals.reranking import GATES, K1, OWN, expanded, gated, k_reciprocal
from tmm_engine.bench.rivals.roster import roster
from tmm_engine.bench.suite import Suite
from tmm_engine.index import ArraySource
from tmm_engine.index.descriptors.calibration import Calibrated, calibrate
from tmm_engine.index.descriptors.layers import Layer, find_layers
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.rerank.recognise import Recognised

N, Q, K = 120, 4, 5
NOISE = [parse("brightness 0.5"), parse("gaussian 1")]
FAST = Method.parse("fast,trigger.steps=5")
QUERIES = (IMAGES[N : N + Q, None] / np.float32(255)).astype(np.float32)


@pytest.fixture(scope="module")
def held() -> HeldOut:
    suite = Suite.load(ArraySource(IMAGES[:N], LABELS[:N], name="digits"), make_classifier(), exemplars=N, seed=0)
    return HeldOut(suite, "digits (others)", None, QUERIES, LABELS[N : N + Q].astype(np.int64))


@pytest.fixture(scope="module")
def calibrated(held: HeldOut) -> Calibrated:
    return calibrate(IMAGES[:N, None], LABELS[:N].astype(np.int64), held.suite.classifier, queries=20)


@pytest.fixture(scope="module")
def measured(held: HeldOut, calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rivals") / "rivals.jsonl"
    with held.suite.records(path, "rivals", [FAST], KEY, k=K, chosen=calibrated.report) as file:
        measure_rivals(held, calibrated, file, perturbations=NOISE, k=K)
        measure_presets(held, held.suite.retrievers([FAST]), file, perturbations=NOISE, k=K)
    return path


def test_every_way_is_measured_on_both_jobs(held: HeldOut, measured: Path) -> None:
    records = read_records(measured).records
    names = {FAST.name} | {rival.name for rival in roster(find_layers(held.suite.classifier))}
    missing = names - {record["method"] for record in records}
    assert not missing
    assert len(records) == 2 * 3 * len(names)
    for record in records:
        assert len(record["right"]) == Q
        field = "rank" if record["job"] == VERY_IMAGE else "kept"
        assert all(0 <= value <= (N if field == "rank" else K) for value in record[field])


def test_clean_queries_find_themselves_and_keep_their_answer(measured: Path) -> None:
    clean = [record for record in read_records(measured).records if record["perturbation"] == "clean"]
    for record in clean:
        if record["job"] == UNSEEN:
            assert record["kept"] == [K] * Q
        elif not any(coarse in record["method"] for coarse in ("hash", "1x1", "expansion", "k-reciprocal")):
            assert record["rank"] == [0] * Q, record["method"]


def test_figures_are_those_that_the_slow_benchmark_gives(held: HeldOut, measured: Path, tmp_path: Path) -> None:
    names = ("l2", "cosine", "cosine,stretch=true")
    methods = [Method.parse(name) for name in names]
    with held.suite.records(tmp_path / "unseen.jsonl", "unseen", methods, UNSEEN_KEY, k=K) as file:
        measure_unseen(
            held.suite.retrievers(methods),
            held.queries,
            held.labels,
            held.suite.store,
            file,
            perturbations=[parse("brightness 0.5")],  # which draws nothing
            classifier=held.suite.classifier,
            k=K,
        )
    with (
        RecordFile.open(measured, read_records(measured).settings, KEY, ()) as own,
        RecordFile.open(
            tmp_path / "unseen.jsonl", read_records(tmp_path / "unseen.jsonl").settings, UNSEEN_KEY, ()
        ) as slow,
    ):
        for name in names:
            fast = own.find(job=UNSEEN, perturbation="brightness 0.5", method=name)
            rows = [slow.find(query=query, perturbation="brightness 0.5", method=name) for query in range(Q)]
            assert fast is not None
            assert [row["label_precision"] * K for row in rows if row] == pytest.approx(fast["right"])
            assert [row["overlap"] * K for row in rows if row] == pytest.approx(fast["kept"])


def test_a_rerun_goes_on(held: HeldOut, calibrated: Calibrated, measured: Path) -> None:
    before = measured.read_bytes()
    with held.suite.records(measured, "rivals", [], KEY, k=K, chosen=calibrated.report) as file:
        measure_rivals(held, calibrated, file, perturbations=NOISE, k=K)
    assert measured.read_bytes() == before


def test_figures_of_presets_are_the_retrievers_own(held: HeldOut, measured: Path) -> None:
    [fast] = held.suite.retrievers([FAST])
    rows, labels = held.suite.queries(Q), held.suite.store.labels
    exemplars = held.suite.store.images(rows) / np.float32(255)
    dark = parse("brightness 0.5")  # which draws nothing
    found: dict[str, list[np.ndarray]] = {
        kind: [fast.scores(dark.apply(image, seed=0) if kind == "dark" else image) for image in images]
        for kind, images in (("clean", QUERIES), ("dark", QUERIES), ("own", exemplars))
    }
    own = [fast.scores(dark.apply(image, seed=0)) for image in exemplars]
    best = {kind: [np.argsort(-scores, kind="stable")[:K] for scores in some] for kind, some in found.items()}
    with RecordFile.open(measured, read_records(measured).settings, KEY, ()) as file:
        very, unseen = (file.find(job=job, perturbation=dark.name, method=FAST.name) for job in (VERY_IMAGE, UNSEEN))
    assert very is not None and unseen is not None
    assert very["rank"] == [int((scores > scores[row]).sum()) for scores, row in zip(own, rows, strict=True)]
    others = [
        [place for place in np.argsort(-scores, kind="stable") if place != row][:K]
        for scores, row in zip(own, rows, strict=True)
    ]
    assert very["right"] == [int((labels[own] == labels[row]).sum()) for own, row in zip(others, rows, strict=True)]
    pairs = list(zip(best["clean"], best["dark"], strict=True))
    assert unseen["kept"] == [len(set(before) & set(after)) for before, after in pairs]
    assert unseen["right"] == [
        int((labels[after] == label).sum()) for after, label in zip(best["dark"], held.labels, strict=True)
    ]
    assert isinstance(fast, Recogniser)
    copies = [fast.recognised(dark.apply(image, seed=0)) for image in QUERIES]
    assert unseen["taken"] == [copy_of is not None and copy_of.share >= 0.5 for copy_of in copies]


def test_presets_go_on_too(held: HeldOut, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [fast] = held.suite.retrievers([FAST])
    path, asked = tmp_path / "rivals.jsonl", []
    path.write_bytes(measured.read_bytes())
    plain = TmmRetriever.scores_beside

    def counted(self: TmmRetriever, others: Sequence[TmmRetriever], query: np.ndarray) -> list[np.ndarray]:
        asked.append(query)
        return plain(self, others, query)

    monkeypatch.setattr(TmmRetriever, "scores_beside", counted)
    with RecordFile.open(path, read_records(path).settings, KEY, ()) as file:
        measure_presets(held, [fast], file, perturbations=NOISE, k=K)
        assert not asked, "all of it is there"
        measure_presets(held, [fast], file, perturbations=[*NOISE, parse("brightness 1")], k=K)
        record = file.find(job=UNSEEN, perturbation="brightness 1", method=FAST.name)
    assert len(asked) == 2 * Q, "of both jobs; the clean queries are not answered again"
    assert record is not None and record["kept"] == [K] * Q, "compared with the clean answers of the file"


def test_presets_are_checked_at_once() -> None:
    assert [preset.name for preset in _parse_presets("fast; paper,head.epochs=2")] == ["fast", "paper,head.epochs=2"]
    assert _parse_presets(None) == []
    for text, problem in (
        ("fast;cosine", "--presets: nothing is called 'cosine'.*known: paper, fast"),
        (" ; ", "--presets: expected different ones"),
        ("fast;fast", "--presets: expected different ones"),
    ):
        with pytest.raises(InputError, match=problem):
            _parse_presets(text)


def test_ways_are_compared_over_the_same_noise(measured: Path, tmp_path: Path) -> None:
    lines = measured.read_text(encoding="utf-8").splitlines()
    easy = [line.replace('"cosine"', '"easy"') for line in lines if '"cosine"' in line and '"gaussian' not in line]
    (tmp_path / "rivals.jsonl").write_text("\n".join([*lines, *easy]) + "\n", encoding="utf-8")
    text = write_report(tmp_path, tmp_path / "out")[0].read_text(encoding="utf-8")
    assert text.count("All methods, over what every one of them met (brightness 0.5):") == 2, "of each job"
    assert text.count("Those that met the most, over all of that:") == 2
    common, more = text.split("**Job")[1].split("Those that met the most")
    row = next(line for line in common.splitlines() if line.startswith("| easy |"))
    assert row.replace("easy", "cosine") in common, "the same figures under the same noise"
    assert "| easy |" not in more and "| cosine |" in more


def test_ways_without_noise_have_a_report_too(measured: Path, tmp_path: Path) -> None:
    lines = measured.read_text(encoding="utf-8").splitlines()
    clean = [line for line in lines if '"settings"' in line or '"family": "clean"' in line]
    (tmp_path / "rivals.jsonl").write_text("\n".join(clean) + "\n", encoding="utf-8")
    text = write_report(tmp_path, tmp_path / "out")[0].read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| cosine |"))
    assert row.split(" | ")[1].strip() == "–", "no noise, no figure under noise"


def test_the_report_shows_both_jobs_and_what_was_chosen(measured: Path, tmp_path: Path) -> None:
    write_report(measured.parent, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert VERY_IMAGE in text and UNSEEN in text and "The engine chose" in text
    assert "| cosine,stretch=true |" in text and "perceptual hash" in text


def test_the_picture_has_every_way_once_where_its_records_say(measured: Path, held: HeldOut) -> None:
    run = Run(measured, read_records(measured))
    panel = _trade(run)
    names = [FAST.name, *(rival.name for rival in roster(find_layers(held.suite.classifier)))]
    assert {_group(name) for name in names} == set(GROUPS)
    assert sum(len(curve.x) for curve in panel.curves.values()) == len({record["method"] for record in run.records})
    [mrr], [label] = panel.curves["robust"].x, panel.curves["robust"].y
    own = [one for one in run.records if one["method"] == "robust,views=4" and one["family"] != "clean"]
    ranks = [rank for one in own if one["job"] == VERY_IMAGE for rank in one["rank"]]
    right = [hits for one in own if one["job"] == UNSEEN for hits in one["right"]]
    assert (mrr, label) == pytest.approx((np.mean([1 / (1 + rank) for rank in ranks]), np.mean(right) / K))


def test_means_are_those_of_the_exemplars_and_parts_are_of_unit_length(held: HeldOut, calibrated: Calibrated) -> None:
    parts = [part for rival in roster(find_layers(held.suite.classifier)) for _, part in rival.parts]
    own = [part for part in parts if part.seen != "own statistics"]
    passes = Passes(held.suite.classifier, calibrated, own)
    passes.fit(QUERIES)
    for part, rows in passes(QUERIES).items():
        if part.source != "features, not of unit length":
            lengths = rows.norm(dim=1)
            assert torch.allclose(lengths, torch.ones(()), atol=1e-5) or part.power is not None, part


def test_a_gate_moves_a_copy_to_its_exemplar_and_leaves_others() -> None:
    exemplars = normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)))
    queries = torch.stack([normalize(exemplars[3] + 0.01, dim=0), normalize(exemplars[3] + exemplars[4], dim=0)])
    scores, taken = gated(queries, exemplars, (queries, exemplars), threshold=0.8)
    assert taken.tolist() == [True, False]
    assert torch.allclose(scores[0], exemplars @ exemplars[3], atol=1e-3)
    assert torch.allclose(scores[1], exemplars @ queries[1], atol=0.1)


def test_what_comes_first_is_what_the_rule_says() -> None:
    """The recogniser's nearest, exemplar 7, ranks fourth; its ratio is 0.95, which only the rank and `always` take."""
    exemplars = torch.eye(200)[:160]
    by_rank = torch.zeros(200)
    by_rank[:3], by_rank[7] = 0.5, 0.25
    by_rank = normalize(by_rank, dim=0)
    nearest, second = 0.5, 1 - (1 - 0.5) / 0.95**2
    copy = torch.zeros(200)
    copy[7], copy[8] = nearest, second
    copy[199] = (1 - copy.square().sum()).sqrt()
    first = {}
    for name, rule in GATES.items():
        scores, taken = gated(by_rank[None], exemplars, (copy[None], exemplars), threshold=0.7, first=rule)
        assert not taken[0]
        first[name] = int(scores[0].argmax())
    assert first == {"gate": 7, "never first": 0, "first by ratio": 0, "first by rank": 7, "always first": 7}


@pytest.mark.parametrize("ratio", [0.5, 0.95, 0.9995])
@pytest.mark.parametrize("rank", [0, 20, 300])
def test_the_engines_rule_is_either_of_its_halves(ratio: float, rank: int) -> None:
    recognised = Recognised(7, ratio, 0.0)
    by = {name: rule(recognised, rank, 2000) for name, rule in GATES.items()}
    assert by["gate"] == (by["first by ratio"] or by["first by rank"])
    assert by["never first"] <= by["gate"] <= by["always first"]


def test_expansion_is_the_weighted_sum_with_the_nearest() -> None:
    exemplars = normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(1)))
    query = normalize(torch.randn(1, 8, generator=torch.Generator().manual_seed(2)))
    similarity = (query @ exemplars.T)[0]
    first, second = similarity.topk(2).indices.tolist()
    by_hand = query[0] + similarity[first] ** 3 * exemplars[first] + similarity[second] ** 3 * exemplars[second]
    expected = exemplars @ normalize(by_hand, dim=0)
    assert torch.allclose(expanded(query, exemplars, neighbours=2, power=3.0)[0], expected, atol=1e-6)


def test_reciprocal_neighbours_come_before_hubs() -> None:
    """A cluster's member is nearer to a query of that cluster than a hub that is near to everything."""
    generator = torch.Generator().manual_seed(3)
    centre = normalize(torch.randn(1, 32, generator=generator))
    cluster = normalize(centre + 0.05 * torch.randn(K1, 32, generator=generator))
    others = normalize(torch.randn(60, 32, generator=generator))
    exemplars = torch.cat([cluster, others])
    query = normalize(centre + 0.05 * torch.randn(1, 32, generator=generator))
    scores = k_reciprocal(query, exemplars)[0]
    assert set(scores.topk(K1).indices.tolist()) == set(range(K1))
    assert scores.max() <= 0 and scores.min() >= -(1 - OWN) - 2 * OWN


def test_hashes_of_equal_images_agree_and_of_others_do_not() -> None:
    for name in HASHES:
        bits = hashed(QUERIES, name)
        similarity = bits @ bits.T
        assert np.allclose(np.diag(similarity), 1.0, atol=1e-6)
        assert similarity[~np.eye(Q, dtype=bool)].max() < 1.0


def test_a_median_takes_single_pixels_away() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1.0
    assert not median_filtered(image).any()
    flat = torch.full((1, 3, 8, 8), 0.25)
    assert torch.equal(median_filtered(flat), flat)


def test_own_statistics_are_a_share_of_the_image_s_own() -> None:

    classifier = Classifier.from_architecture(
        "resnet18", image_shape=(3, 32, 32), seed=0, num_classes=3, small_stem=True
    )
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    same, other = with_own_statistics(classifier, share=0.0), with_own_statistics(classifier, share=0.5)
    assert same is not None and other is not None
    with torch.no_grad():
        plain = classifier.features(images)
        assert torch.allclose(same.features(images), plain, atol=1e-4)
        assert not torch.allclose(other.features(images), plain, atol=1e-2)
        one_by_one = torch.cat([other.features(image[None]) for image in images])
        assert torch.allclose(other.features(images), one_by_one, atol=1e-4)  # each image's own, not the batch's
    plain_network = Classifier.from_architecture("vit_tiny_32", image_shape=(3, 32, 32), seed=0, num_classes=3)
    assert with_own_statistics(plain_network) is None


def test_the_recogniser_is_computed_for_every_gate(held: HeldOut, calibrated: Calibrated) -> None:
    passes = Passes(held.suite.classifier, calibrated, [Part(RECOGNISER, 2)])
    passes.fit(QUERIES)
    [rows] = passes(QUERIES).values()
    assert rows.shape[0] == Q


def test_only_the_ways_that_are_asked_for_are_compared() -> None:
    rivals = roster([Layer("layer1"), Layer("layer2")])
    names = [rival.name for rival in among(rivals, "l2; layer?:4x4 whitened;robust,views=4")]
    assert names == ["l2", "layer1:4x4 whitened", "layer2:4x4 whitened", "robust,views=4"]
    assert among(rivals, None) == rivals
    with pytest.raises(InputError, match=r"'cosin'.*did you mean 'cosine'"):
        among(rivals, "l2;cosin")


def test_vectors_are_kept_and_read_again(held: HeldOut, calibrated: Calibrated, tmp_path: Path) -> None:
    passes = Passes(held.suite.classifier, calibrated, [Part(RECOGNISER, 2), Part("average hash")])
    passes.fit(QUERIES)
    images = held.suite.store.images(np.arange(30))
    first = vectors_of(passes, images, folder=tmp_path)
    [kept] = tmp_path.iterdir()
    before = kept.stat().st_mtime_ns
    for again in (vectors_of(passes, images, folder=tmp_path), vectors_of(passes, images)):
        assert all(torch.equal(again[part], rows) for part, rows in first.items())
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(b"torn")
    torn = vectors_of(passes, images, folder=tmp_path)
    assert all(torch.equal(torn[part], rows) for part, rows in first.items())
    passes.fit(QUERIES[:2])  # other means: other vectors
    vectors_of(passes, images, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
