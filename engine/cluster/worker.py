"""What workers of every kind begin with: their device, their share of the CPUs, the classifier, who they are."""

import copy
import os
from pathlib import Path

import torch
from torch import nn

from tmm_engine.cluster.crew import Presence
from tmm_engine.cluster.identity import Identity
from tmm_engine.index.errors import IndexStateError, ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.store.manifest import MODEL


def presence() -> Presence:
    """Of this process."""
    import ray

    return Presence(Identity.own(), ray.util.get_node_ip_address(), os.getpid())


def own_device(cpus: int) -> str:
    """Where this worker computes: on the GPU that it was given, else on so many CPUs."""
    import ray

    torch.set_num_threads(cpus)
    return "cuda" if ray.get_gpu_ids() else "cpu"


def load_classifier(index: Path, fingerprint: str, network: nn.Module | None, device: str) -> Classifier:
    """The classifier of an index on a path that all machines share.

    Args:
        index: Its folder.
        fingerprint: What the classifier's must be.
        network: The user's own code, where it is that.
        device: Where it is to be.

    Raises:
        IndexStateError: this machine does not see the folder.
        ModelError: it is another classifier here.
    """
    check_seen(index)
    loaded = Classifier.load(index / MODEL, model=network)
    classifier = loaded.known_as(fingerprint)
    if classifier is None:
        raise ModelError(
            f"a Ray worker on {presence().machine} makes the model {loaded.fingerprint[:12]}… of {index}, not "
            f"{fingerprint[:12]}…: its code is another there; install the same on all machines. Nothing was changed"
        )
    return classifier.to(device)


def check_seen(index: Path) -> None:
    """Refuse a machine that does not see an index.

    Raises:
        IndexStateError: it does not.
    """
    if not (index / MODEL).is_file():
        raise IndexStateError(
            f"a Ray worker on {presence().machine} does not see {index}: put the index on a path that all machines "
            f"share, such as NFS"
        )


def own_network(classifier: Classifier) -> nn.Module | None:
    """The user's whole network, where it is code of theirs and has to be sent; None where its name is enough."""
    if not classifier.spec.is_user_code:
        return None
    network: nn.Module = copy.deepcopy(classifier.backbone.get_submodule("network")).cpu()
    network.set_submodule(classifier.spec.head, copy.deepcopy(classifier.head).cpu())
    return network
