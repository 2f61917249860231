"""What an explanation's kinds of exemplars are called, and what their numbers mean."""

from tmm_engine.results import Explanation, Hit


def reasons(explanation: Explanation) -> list[tuple[str, str, tuple[Hit, ...]]]:
    """Title, meaning and exemplars of each kind, in the order in which they are shown."""
    name = explanation.class_name
    return [
        (
            f"Nearest that are not {name}",
            "the likeliest other answer, if these look closer; scores as above",
            explanation.unlike,
        ),
        (
            "Typical of each",
            f"in the middle of all {name}, and of all of the nearest other class; similarity to the query",
            explanation.prototypes,
        ),
        (
            f"Pulled towards {name}",
            f"training on these makes the model surest that it is {name}; influence (TracIn, last layer)",
            explanation.pulled_towards,
        ),
        (
            f"Pulled away from {name}",
            "training on these makes it least sure; influence, below 0",
            explanation.pulled_away,
        ),
    ]
