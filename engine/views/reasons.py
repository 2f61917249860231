"""What an explanation's kinds of exemplars are called, and what their numbers mean."""

from tmm_engine.results import Explanation, Hit


def reasons(explanation: Explanation) -> list[tuple[str, str, tuple[Hit, ...]]]:
    """Title, meaning and exemplars of each kind, in the order in which they are shown."""
    name = explanation.class_name
    return [
        (
            f"Nearest that are not {name}",
            "the nearest exemplars of another class: how near the alternative is; scores as above",
            explanation.unlike,
        ),
        (
            "Typical of these classes",
            f"the middle of {name}, and that of the class of the nearest that is not; similarity to the query",
            explanation.prototypes,
        ),
        (
            f"Pulled towards {name}",
            "a training step on these makes the decision firmer most (TracIn, last layer); influence",
            explanation.pulled_towards,
        ),
        (
            f"Pulled away from {name}",
            "a training step on these makes the decision weaker most; influence",
            explanation.pulled_away,
        ),
    ]
