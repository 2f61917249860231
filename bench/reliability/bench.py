"""`engine bench reliability`: what an index is after kills, damage, full disks and hostile input; counted.

Everything that could die runs in a process of its own, forked from a server that has only imported the libraries.
"""

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tmm_engine.bench.reliability import faults, hostile
from tmm_engine.bench.reliability.faults import Content, Plan
from tmm_engine.bench.reliability.surroundings import Attempts, Skipped, clocks, full_disks, permissions, read_only
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.changes import add_exemplars, delete_exemplars
from tmm_engine.index.store.manifest import MANIFEST, Manifest, older_versions
from tmm_engine.index.store.target import recover
from tmm_engine.rerank.columns import global_columns
from tmm_engine.rerank.global_trigger import make_global_trigger
from tmm_engine.verify import verify_index

PATIENCE = 60.0  # seconds for anything that runs in a process of its own
BARS = {
    "trials": 200,
    "lost": 0,
    "wrong_silent": 0,
    "undetected": 0,
    "hostile_cases": 2000,
    "crashed": 0,
    "memory_growth_mib": 20.0,
    "where_ratio": 1.10,
}
"""At least for `trials` and `hostile_cases`, at most for the others."""


@dataclass(slots=True)
class Reliability:
    """Figures, and what did not go as it should.

    Attributes:
        trials: Writers killed at random moments.
        lost: Changes that were reported as done and are not there.
        wrong_silent: Times that something was opened and was not what was written, without an error.
        undetected: Damage that opening with every check did not find.
        damaged: Outcomes of opening after damage, without and with the full check.
        disk_full: Outcomes of changes where the disk is full.
        surroundings: Outcomes where permissions are missing, the disk is read only, or the clock was set back.
        hostile_cases: Generated inputs.
        hostile: Outcomes of them.
        crashed: Tracebacks, deaths, hangs, and too much memory, of damage and hostile input together.
        endurance: Growth over many searches in one process.
        where: A TMM search over filtered exemplars beside one over an index of the same number.
        failures: In words.
    """

    trials: int = 0
    lost: int = 0
    wrong_silent: int = 0
    undetected: int = 0
    damaged: dict[str, int] = field(default_factory=dict)
    disk_full: dict[str, int] = field(default_factory=dict)
    surroundings: dict[str, int] = field(default_factory=dict)
    hostile_cases: int = 0
    hostile: dict[str, int] = field(default_factory=dict)
    crashed: int = 0
    endurance: dict[str, float] = field(default_factory=dict)
    where: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def bars(self) -> dict[str, tuple[float, bool]]:
        """Each figure that has a bar, and whether it holds."""
        figures = {name: float(getattr(self, name)) for name in BARS if hasattr(self, name)}
        figures |= {"memory_growth_mib": self.endurance.get("mib", 0.0), "where_ratio": self.where.get("ratio", 0.0)}
        least = ("trials", "hostile_cases")
        return {
            name: (value, value >= BARS[name] if name in least else value <= BARS[name])
            for name, value in figures.items()
        }

    def to_json(self) -> dict[str, Any]:
        """All figures, with the bars."""
        bars = {name: {"value": value, "bar": BARS[name], "holds": ok} for name, (value, ok) in self.bars().items()}
        return asdict(self) | {"bars": bars}


class ReliabilityBench:
    """All trials in one folder, which is removed at the end.

    Args:
        trials: Writers to kill.
        cases: Hostile inputs to generate.
        searches: Of the endurance test.
        rows: Exemplars that a filter leaves, for its overhead.
        seed: Of everything random.
        progress: Told of each part.
    """

    def __init__(
        self,
        *,
        trials: int = 200,
        cases: int = 2100,
        searches: int = 500,
        rows: int = 2000,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        self._trials, self._cases, self._searches, self._rows = trials, cases, searches, rows
        self._random = random.Random(seed)
        self._progress = progress
        self._context: ForkServerContext = get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch._dynamo", "tmm_engine.bench.reliability.faults", "tmm_engine.bench.reliability.hostile"]
        )
        self.result = Reliability()

    def run(self) -> Reliability:
        """Everything, one after the other."""
        with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
            Path(folder).chmod(0o755)  # some of what follows gives its privileges up
            parts = (self._kill_trials, self._damage, self._full_disks, self._surroundings, self._endure, self._hostile)
            for part in parts:
                part(Path(folder) / part.__name__)
                shutil.rmtree(Path(folder) / part.__name__, ignore_errors=True)
        return self.result

    # ---- kills

    def _kill_trials(self, folder: Path) -> None:
        for trial in range(self._trials):
            index = folder / str(trial) / "idx"
            index.parent.mkdir(parents=True)
            self._kill(index, seed=self._random.randrange(2**30), seconds=self._random.uniform(0.0, 0.6))
            shutil.rmtree(index.parent)
            self.result.trials += 1
            self._progress("killing writers", trial + 1, self._trials)

    def _kill(self, index: Path, *, seed: int, seconds: float) -> None:
        """Kill a writer in the middle of a plan; the index must be after the last change reported, or the next one."""
        plan = Plan(seed)
        history = [plan.first()]
        write_index(faults.source_of(history[0]), index, faults.small_classifier())
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=faults.change_until_killed, args=(index, seed, sender))
        process.start()
        sender.close()
        receiver.recv()  # it begins
        time.sleep(seconds)
        process.kill()
        process.join()
        reported = max([0, *_received(receiver)])
        while len(history) <= reported + 1:
            history.append(plan.next(history[-1])[1])
        what = f"a kill after {reported} changes (seed {seed})"
        allowed = [history[reported], history[reported + 1]]
        if not self._any_right(index, allowed, what):
            return
        faults.carry_out(index, "add", self._now, self._now | {"after": 7}, faults.small_classifier())
        self._any_right(index, [self._now | {"after": 7}], f"the writer after {what}")
        findings = verify_index(index, model=faults.small_network()).findings
        if findings:
            self._fail("wrong_silent", f"{what}: {findings[0].what}")
        for number in older_versions(index):
            if number < Manifest.read(index).version:
                with faults.open_small(index, version=number) as engine:
                    if faults.content_of(engine) not in history:
                        self._fail("wrong_silent", f"{what}: version {number} is none that ever was")

    def _any_right(self, index: Path, allowed: list[Content], what: str) -> bool:
        """Whether the index opens at one of these contents and answers accordingly; `_now` is that content."""
        try:
            recover(index)
            with faults.open_small(index, verify=True) as engine:
                found = faults.content_of(engine)
                if found not in allowed:
                    self._fail("lost", f"{what}: {len(found)} exemplars, which is no version that may be there")
                    return False
                self._now = found
                if not faults.answers_right(engine, found):
                    self._fail("wrong_silent", f"{what}: answers are not those of the exemplars")
        except IndexStateError as error:
            self._fail("lost", f"{what}: {error}")
            return False
        return True

    # ---- damage

    def _damage(self, folder: Path) -> None:
        folder.mkdir()
        index = self._whole(folder / "idx")
        files = sorted(path.relative_to(index) for path in index.rglob("*") if path.is_file())
        outcomes: Counter[str] = Counter()
        for done, name in enumerate(files):
            for how, raw in self._damages((index / name).read_bytes()):
                copy = folder / "copy"
                shutil.copytree(index, copy)
                if raw is None:
                    (copy / name).unlink()
                else:
                    (copy / name).write_bytes(raw)
                self._judge(copy, name, how, outcomes)
                shutil.rmtree(copy)
            self._progress("damaging files", done + 1, len(files))
        self.result.damaged = dict(outcomes)

    def _judge(self, copy: Path, name: Path, how: str, outcomes: Counter[str]) -> None:
        """Open and search without and with the full check; data of exemplars is only vouched for with it."""
        data = "/data/" in name.as_posix()
        needed = name.as_posix() == MANIFEST or name.as_posix() in self._needed
        for verify in (False, True):
            outcome = self._alone(faults.outcome_of, copy, *self._expected, verify=verify)
            kind = "data" if data else "other"
            outcomes[f"{kind}, {'full' if verify else 'quick'} check: {outcome.split(':')[0]}"] += 1
            if outcome.startswith("crashed") and (verify or not data):
                self._fail("crashed", f"{name} {how}: {outcome}")
            if outcome == "wrong" and (verify or not data):
                self._fail("wrong_silent", f"{name} {how}, verify={verify}: another answer")
            if verify and needed and outcome != "error" and not self._means_the_same(copy, name):
                self._fail("undetected", f"{name} {how}: {outcome}")

    def _means_the_same(self, copy: Path, name: Path) -> bool:
        """White space in `index.json` may differ without its content differing."""
        return name.as_posix() == MANIFEST and Manifest.read(copy) == self._manifest

    def _damages(self, raw: bytes) -> Iterator[tuple[str, bytes | None]]:
        places = {0, len(raw) // 2, len(raw) - 1, *(self._random.randrange(len(raw)) for _ in range(3))}
        for place in sorted(places):
            flipped = bytearray(raw)
            flipped[place] ^= 1 << self._random.randrange(8)
            yield f"flipped at {place}", bytes(flipped)
        for length in sorted({0, len(raw) // 2, len(raw) - 1}):
            yield f"cut to {length}", raw[:length]
        yield "missing", None

    def _whole(self, index: Path) -> Path:
        """An index with everything that one can have: versions, deletions, a global trigger, a FAISS cache."""
        classifier, content = faults.small_classifier(), Plan(1).first()
        source = faults.source_of(content)
        columns = global_columns(make_global_trigger(source, classifier, faults.QUICK), classifier)
        write_index(source, index, classifier, columns=columns, neighbours="HNSW8")
        more = {f"more {n}": 100 + n for n in range(8)}
        add_exemplars(index, faults.source_of(more), classifier)
        delete_exemplars(index, ids=["id 3", "more 5"])
        content = {id_: number for id_, number in (content | more).items() if id_ not in ("id 3", "more 5")}
        with faults.open_small(index) as engine:
            self._expected = (content, faults.ranked(engine))
        self._manifest = Manifest.read(index)
        self._needed = set(self._manifest.files)
        return index

    # ---- disks, endurance, input

    def _full_disks(self, folder: Path) -> None:
        self.result.disk_full = self._try_all(full_disks(folder))

    def _surroundings(self, folder: Path) -> None:
        for attempts in (permissions, read_only, clocks):
            self.result.surroundings |= self._try_all(attempts(folder / attempts.__name__))

    def _try_all(self, attempts: Attempts) -> dict[str, int]:
        """How often there was which outcome; one that is not allowed, or another content than its own, fails."""
        outcomes: Counter[str] = Counter()
        for attempt in attempts:
            if isinstance(attempt, Skipped):
                outcomes[attempt.what] += 1
                continue
            with attempt.around:
                outcome = self._alone(attempt.work, *attempt.arguments)
            outcomes[f"{attempt.what}: {outcome}"] += 1
            if outcome not in attempt.allowed:
                wrong = outcome in ("right", "wrong", "done")
                self._fail("wrong_silent" if wrong else "crashed", f"{attempt.what}: {outcome}")
            elif (content := attempt.allowed[outcome]) is not None:
                self._any_right(attempt.index, [content], attempt.what)
        return dict(outcomes)

    def _endure(self, folder: Path) -> None:
        folder.mkdir()
        index = self._whole(folder / "idx")
        self._progress("searching", 0, self._searches)
        found = self._alone(faults.endure, index, self._searches, patience=1200.0)
        if isinstance(found, str):
            self._fail("crashed", f"endurance: {found}")
        else:
            self.result.endurance = found
        (folder / "where").mkdir()
        overhead = self._alone(faults.where_overhead, folder / "where", self._rows, patience=1200.0)
        if isinstance(overhead, str):
            self._fail("crashed", f"filter: {overhead}")
        else:
            self.result.where = overhead

    def _hostile(self, folder: Path) -> None:
        outcomes: Counter[str] = Counter()
        each = -(-self._cases // len(hostile.KINDS))
        for kind in hostile.KINDS:
            next_seed = 0
            while next_seed < each:
                next_seed = self._hostile_run(kind, next_seed, each, outcomes)
            self._progress("hostile input", sum(outcomes.values()), each * len(hostile.KINDS))
        self.result.hostile = dict(outcomes)

    def _hostile_run(self, kind: str, start: int, stop: int, outcomes: Counter[str]) -> int:
        """Cases in one process until they are through or it is dead; returns the seed to go on with."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=hostile.run_cases, args=(kind, start, stop, sender))
        process.start()
        sender.close()
        seed = start
        while seed < stop:
            outcome = "hangs"
            try:
                if receiver.poll(PATIENCE):
                    outcome = receiver.recv()[1]
            except EOFError:
                outcome = "the process died"
            self.result.hostile_cases += 1
            known = outcome in ("accepted", "refused")
            outcomes[f"{kind}: {outcome if known else 'crashed'}"] += 1
            if not known:
                self._fail("crashed", f"{kind} {seed}: {outcome}")
            seed += 1
            if outcome in ("hangs", "the process died"):
                break
        process.kill()
        process.join()
        return seed

    def _alone(self, work: Callable[..., Any], *arguments: Any, patience: float = PATIENCE, **options: Any) -> Any:
        """What work returns, or a text that begins with ``crashed``, when it dies, hangs or raises."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(work, arguments, options, sender))
        process.start()
        sender.close()
        try:
            state, value = receiver.recv() if receiver.poll(patience) else ("crashed", f"no answer in {patience:g} s")
        except EOFError:
            process.join()
            state, value = "crashed", f"the process ended with {process.exitcode}"
        process.kill()
        process.join()
        return value if state == "done" else f"crashed: {value}"

    def _fail(self, figure: str, what: str) -> None:
        setattr(self.result, figure, getattr(self.result, figure) + 1)
        self.result.failures.append(f"{figure}: {what}")


def print_reliability(result: Reliability, *, as_json: bool) -> None:
    """On stdout: one JSON object, or the bars and the counts as lines."""
    if as_json:
        print(json.dumps(result.to_json()))
        return
    for name, (value, holds) in result.bars().items():
        print(f"{'holds' if holds else 'FAILS'}  {name} = {value:g} (bar {BARS[name]:g})")
    for title in ("damaged", "disk_full", "surroundings", "hostile", "endurance", "where"):
        for name, count in sorted(getattr(result, title).items()):
            print(f"{title}: {name}: {count:g}")
    for failure in result.failures:
        print(failure)


def _answer(work: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], result: Connection) -> None:
    try:
        result.send(("done", work(*arguments, **options)))
    except BaseException as error:
        result.send(("crashed", f"{type(error).__name__}: {error}"[:300]))


def _received(receiver: Connection) -> Iterator[int]:
    """Everything that a dead process had sent."""
    try:
        while receiver.poll(0):
            yield receiver.recv()
    except EOFError:
        return
