"""Every benchmark: from here come the commands of `engine bench` and the sections of its report, in this order."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmm_engine.bench.benchmark import Benchmark

SUMMARIES = {
    "robustness": "Does a perturbed exemplar still find itself?",
    "radius": "How far can a query move before its top k changes?",
    "unseen": "Do the neighbours of held-out queries stay the same under noise?",
    "rivals": "Is there a simpler way?",
    "gate": "Can an attack pass a query off as another exemplar?",
    "semantic": "Do held-out queries find their own kind?",
    "ablation": "What is each choice in TMM-NN worth?",
    "ood": "How often does a foreign exemplar outrank the true one?",
    "oracle": "What does a judge from outside say of the neighbours?",
    "audit": "Does an audit find planted copies, leaks, wrong labels and foreign images?",
    "classify": "Do sets of classes hold the right one as often as said?",
    "candidates": "What do candidate sets and the global trigger give up?",
    "latency": "How long does every path take?",
    "ray": "What does a second machine bring?",
    "scale": "How does every path grow with the number of exemplars?",
    "serve": "What does HTTP cost, and what holds under load, hostile requests and kills?",
    "reliability": "What is lost or wrong under faults and hostile input?",
}
"""By name, which is that of its file in `benchmarks/`: a line of help, so that listing them imports none."""


def load(name: str) -> "Benchmark":
    """The benchmark of this name; imports PyTorch and all."""
    benchmark: Benchmark = import_module(f"tmm_engine.bench.benchmarks.{name}").BENCHMARK
    return benchmark
