"""What a terminal shows of an answer; and a log file of long work: a line now and then, one when a step ends."""

from tests.made_results import make_result
from tmm_engine.cli.display import LOG_SECONDS, ProgressLog, print_result, progress_bar


def lines_of(*calls: tuple[float, str, int, int]) -> list[str]:
    """The lines after calls at the given seconds."""
    lines: list[str] = []
    times = iter([seconds for seconds, *_ in calls])
    log = ProgressLog(lines.append, clock=lambda: next(times))
    for _, step, done, total in calls:
        log(step, done, total)
    return lines


def test_short_steps_are_not_logged():
    assert lines_of((0, "reading", 1, 2), (1, "reading", 2, 2), (2, "building", 1, 1), (3, "building", 1, 1)) == []


def test_long_steps_have_a_line_now_and_then_and_one_at_their_end():
    often = [(float(second), "building", second, 100) for second in range(101)]
    assert lines_of(*often) == [
        "building: 30 of 100, 1/s",
        "building: 60 of 100, 1/s",
        "building: 90 of 100, 1/s",
        "building: 100 of 100, 1/s",
    ]


def test_a_new_round_of_a_step_starts_its_own_clock():
    calls = [(0, "pass", 5, 10), (LOG_SECONDS - 1, "pass", 10, 10), (LOG_SECONDS, "pass", 1, 10), (50, "pass", 10, 10)]
    assert lines_of(*calls) == []


def test_where_there_is_no_terminal_progress_is_a_log(capsys):
    with progress_bar() as progress:
        assert isinstance(progress, ProgressLog)
        progress("searching", 1, 1)
    assert capsys.readouterr().err == ""


def test_a_table_says_what_its_numbers_are(capsys):
    tuned, baseline = make_result(mode="tmm"), make_result(mode="l2")
    printed = []
    for result in (tuned, baseline):
        print_result(result)
        printed.append(" ".join(capsys.readouterr().out.split()))
    assert "# score P label id 1 -1.5000 0.7500 the 0 digit-0" in printed[0]
    assert f"score: {tuned.score_meaning}; {tuned.confidence_meaning} note: Only some were scored." in printed[0]
    assert "# score label id 1 -1.5000 the 0 digit-0" in printed[1]
    assert printed[1].endswith(f"score: {baseline.score_meaning}")
