"""Labels and classes: matched by name, never by position; how far predictions agree; filters by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmm_engine.index.agreement import Agreement, Tally
from tmm_engine.index.errors import InputError
from tmm_engine.index.labels import Vocabulary, bring_names, match_labels, nearest_names
from tmm_engine.index.store.where import check_comparisons, in_numbers

ANIMALS = Vocabulary(("tabby", "dog", "owl"))
NUMBERS = Vocabulary(("0", "1", "2"))


@given(st.permutations([f"class {n}" for n in range(6)]))
def test_the_same_names_in_any_order_mean_the_same_classes(names: list[str]):
    classes = tuple(f"class {n}" for n in range(6))
    found = match_labels("photos", names, Vocabulary(classes), adopt=True)
    assert found.vocabulary == Vocabulary(classes)
    assert [classes[label] for label in (found.label(n, "x") for n in range(6)) if label is not None] == names
    assert found.notes == ()


def test_numbers_sorted_as_text_are_matched_by_name_with_a_model_that_has_these_names():
    classes = tuple(str(n) for n in range(1, 13))  # 1, 2, …, 12: class 0 is called 1
    found = match_labels("photos", sorted(classes), Vocabulary(classes), adopt=True)
    assert found.numbers == tuple(int(name) - 1 for name in sorted(classes))


def test_a_model_without_names_takes_those_of_a_source_with_as_many_classes_and_says_so():
    found = match_labels("photos", ["cat", "dog", "owl"], NUMBERS, adopt=True)
    assert found.vocabulary == Vocabulary(("cat", "dog", "owl"))
    assert (found.label(2, "x"), found.label(None, "x")) == (2, None)
    [note] = found.notes
    assert "brings no class names" in note
    assert "class 0 is 'cat', class 2 is 'owl'" in note
    assert match_labels("photos", ["0", "1", "2"], NUMBERS, adopt=True).notes == ()


def test_whether_a_model_brings_names():
    assert not bring_names(("0", "1", "2"))
    assert not bring_names(("LABEL_0", "LABEL_1"))
    assert bring_names(("1", "2", "3"))
    assert bring_names(("cat", "dog"))


def test_labels_of_ones_own_are_kept_beside_the_classes_and_the_nearest_of_near_ones_is_named():
    found = match_labels("photos", ["Mittens", "Tabby", "dog", "dogs"], ANIMALS, adopt=True)
    assert found.vocabulary.names == ("tabby", "dog", "owl", "Mittens", "Tabby", "dogs")
    assert found.numbers == (3, 4, 1, 5)
    assert [found.vocabulary.is_class(label) for label in (0, 2, 3)] == [True, True, False]
    own, near = found.notes
    assert "3 of the 4 labels of photos are no class of the model's: 'Mittens', 'Tabby', 'dogs'" in own
    assert "'Tabby' (nearest: 'tabby'), 'dogs' (nearest: 'dog')" in near
    assert "Mittens" not in near
    again = match_labels("more", ["dogs", "Tom"], found.vocabulary)
    assert again.numbers == (5, 6)
    assert again.vocabulary.others == ("Mittens", "Tabby", "dogs", "Tom")
    [note] = again.notes
    assert "1 of the 2 labels of more" in note


def test_as_many_names_as_classes_but_others_are_labels_of_ones_own_where_the_model_brings_names():
    found = match_labels("photos", ["a", "b", "c"], ANIMALS, adopt=True)
    assert found.vocabulary.class_names == ANIMALS.class_names
    assert found.numbers == (3, 4, 5)


def test_another_number_of_classes_than_a_model_without_names_has_is_no_error():
    found = match_labels("photos", ["a", "b"], NUMBERS, adopt=True)
    assert found.numbers == (3, 4)
    assert "no class of the model's 3, which have no names" in found.notes[0]


TWELVE = tuple(map(str, range(12)))


def test_twelve_numbered_folders_are_numbered_as_image_folder_does_which_is_said_with_the_other_reading():
    found = match_labels("photos", sorted(TWELVE), Vocabulary(TWELVE), adopt=True)
    assert found.vocabulary.class_names == tuple(sorted(TWELVE))
    assert found.numbers is None
    _, warning = found.notes
    assert "'10' is taken for the model's class 2, and would be class 10 the other way" in warning
    assert "`class_names=…`" in warning
    assert found.otherwise is not None
    assert [found.vocabulary.class_names.index("10"), found.otherwise[2]] == [2, 10]
    digits = match_labels("photos", list("0123456789"), Vocabulary(tuple("0123456789")), adopt=True)
    assert (digits.notes, digits.otherwise) == ((), None)


def test_numbered_folders_are_the_numbers_where_these_were_given_as_the_names_of_the_classes():
    found = match_labels("photos", sorted(TWELVE), Vocabulary(TWELVE), adopt=True, named=True)
    assert found.vocabulary == Vocabulary(TWELVE)
    assert found.numbers == (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)
    assert (found.notes, found.otherwise) == ((), None)


@pytest.mark.parametrize("classes", [TWELVE, tuple(f"LABEL_{number}" for number in range(12))])
def test_some_numbered_folders_are_the_numbers_of_classes_without_names_which_is_said(classes: tuple[str, ...]):
    found = match_labels("photos", ["10", "2"], Vocabulary(classes), adopt=True)
    assert (found.numbers, found.vocabulary.others) == ((10, 2), ())
    note, warning = found.notes
    assert "taken for the numbers of its classes ('2' is class 2)" in note
    assert "'10' is taken for the model's class 10, and would be class 2 the other way" in warning
    assert found.read_otherwise(np.array([10, 2])).tolist() == [2, 4]
    assert match_labels("more", ["10", "2"], Vocabulary(classes)).numbers == (10, 2)
    few = match_labels("photos", ["0", "2"], Vocabulary(("0", "1", "2")), adopt=True)
    assert (few.numbers, len(few.notes)) == ((0, 2), 1)


def test_a_number_beyond_the_classes_casts_doubt_on_the_others():
    found = match_labels("photos", ["1", "12"], Vocabulary(TWELVE), adopt=True)
    assert found.numbers == (1, 12)
    assert "the others ('1') are taken for the numbers of the model's classes" in found.notes[-1]


def test_labels_that_are_numbers_are_classes_of_a_model_with_names_and_that_is_said():
    [note] = match_labels("list.csv", None, ANIMALS, adopt=True).notes
    assert "labels of list.csv are numbers: they are taken for those of the model's classes (0 is 'tabby')" in note
    assert match_labels("list.csv", None, NUMBERS, adopt=True).notes == ()


def test_a_name_that_two_classes_have_is_none_of_them():
    cranes = Vocabulary(("crane", "dog", "crane"))  # ImageNet has a bird and a machine
    found = match_labels("photos", ["crane", "dog"], cranes, adopt=True)
    assert found.numbers == (3, 1)
    assert "several classes of the model's have one name: 'crane'" in found.notes[1]
    assert not any("nearest" in note for note in found.notes)
    tally = Tally(found.vocabulary)
    tally.count(np.array([3, 3, 1]), np.array([True] * 3), np.array([2, 0, 0]))
    assert (tally.result().compared, tally.result().agreeing) == (3, 2)


@pytest.mark.parametrize("number", [3, -1, 10**6])
def test_a_number_without_a_name_is_a_class_of_the_models(number: int):
    assert match_labels("arrays", None, ANIMALS).label(2, "x") == 2
    with pytest.raises(InputError, match=f"x: label {number}, but the model's head has 3 classes.*are texts"):
        match_labels("arrays", None, ANIMALS).label(number, "x")


def test_near_names():
    known = ["tabby cat", "Café", "great_white"]
    names = ["TABBY-CAT", "cafe\u0301", "great white", "great whit", "zebra"]
    assert nearest_names(names, known) == {
        "TABBY-CAT": "tabby cat",
        "cafe\u0301": "Café",
        "great white": "great_white",
        "great whit": "great_white",
    }


# ---- agreement


def agreement(labels: list[int], predicted: list[int], classes: int = 4, others: int = 0) -> Agreement:
    vocabulary = Vocabulary(tuple(f"c{n}" for n in range(classes)), tuple(f"o{n}" for n in range(others)))
    tally = Tally(vocabulary)
    for label, said in zip(labels, predicted, strict=True):  # in parts, as a build counts
        tally.count(np.array([max(label, said if label < 0 else label)]), np.array([label >= 0]), np.array([said]))
    return tally.result()


def test_agreement_counts_labels_that_are_classes():
    found = agreement([0, 1, 2, 5, -1, 3], [0, 1, 3, 1, 2, 3], others=2)
    assert (found.labelled, found.compared, found.agreeing) == (5, 4, 3)
    assert found.share == 0.75
    assert found.sentences() == ["the model's predictions agree with 75 % of the 4 labels (of 5) that are its classes"]


@pytest.mark.parametrize(
    ("labels", "predicted", "near"),
    [
        ([0, 1, 2, 3] * 5, [1, 2, 3, 0] * 5, True),  # every name at another class
        ([0, 1, 2, 3] * 5, [0, 0, 0, 0] * 5, True),  # always the same
        ([0] * 19 + [1], [0] * 20, True),  # 95 %, but it would say so of anything
        ([0, 1, 2, 3] * 5, [0, 1, 2, 0] * 5, False),
        ([2] * 9, [2] * 9, False),  # a folder of one class
        ([2] * 9, [1, 2, 3, 0, 1, 3, 0, 2, 1], True),
    ],
)
def test_near_chance_is_a_warning(labels: list[int], predicted: list[int], near: bool):
    found = agreement(labels, predicted)
    assert found.near_chance is near
    assert any("near chance" in sentence for sentence in found.sentences()) is near


def test_only_all_is_100_percent_and_only_none_is_0():
    labels = [0, 1] * 500
    assert "99 %" in agreement(labels, [*labels[:-1], 0]).sentences()[0]
    assert "1 %" in agreement(labels, [labels[0], *([2] * 999)]).sentences()[0]
    assert "100 %" in agreement(labels, labels).sentences()[0]


def test_without_labels_nothing_is_claimed():
    assert "no image has a label" in agreement([-1, -1], [0, 1]).sentences()[0]
    assert "no label is a class of the model's" in agreement([4, 4], [0, 1], others=1).sentences()[0]


# ---- filters

NAMED = {"label": ("tabby", "dog", "owl", "Mittens", "O'Neil", "dog"), "predicted": ("tabby", "dog", "owl")}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("label = 3 AND page > 10", "label = 3 AND page > 10"),
        ("label='Mittens'", "((label IN (3) AND NOT label_is_predicted) OR (label_is_predicted AND NULL))"),
        ("'Mittens' = label", "((label IN (3) AND NOT label_is_predicted) OR (label_is_predicted AND NULL))"),
        (
            "predicted = 'tabby' AND label = 'Mittens'",
            "(predicted IN (0)) AND ((label IN (3) AND NOT label_is_predicted) OR (label_is_predicted AND NULL))",
        ),
        (
            "NOT (`label` <> 'dog')",
            "NOT (((label NOT IN (1, 5) AND NOT label_is_predicted) OR (label_is_predicted AND NULL)))",
        ),
        ("label != 'O''Neil'", "((label NOT IN (4) AND NOT label_is_predicted) OR (label_is_predicted AND NULL))"),
        ("predicted NOT  IN ('owl' , 'dog')", "(predicted NOT IN (1, 2))"),
        (
            "label LIKE '%t_en%' OR predicted ilike 'OW%'",
            "((label IN (3) AND NOT label_is_predicted) OR (label_is_predicted AND NULL)) OR (predicted IN (2))",
        ),
        (r"label LIKE 'd\%g'", "((label IN (-1) AND NOT label_is_predicted) OR (label_is_predicted AND NULL))"),
        ("label IS NULL", "label_is_predicted"),
        ("label is not null", "NOT label_is_predicted"),
        ("label IN (1, 2)", "label IN (1, 2)"),
        ("label = predicted", "label = predicted"),
        ("my_label = 'x' AND label_is_predicted", "my_label = 'x' AND label_is_predicted"),
        ("path = 'label = ''dog''' OR `label = 'dog'` = 1", "path = 'label = ''dog''' OR `label = 'dog'` = 1"),
    ],
)
def test_names_in_a_filter_become_numbers(where: str, expected: str):
    assert in_numbers(where, NAMED) == expected


def test_an_unknown_name_in_a_filter_is_an_error_with_the_nearest():
    with pytest.raises(InputError, match=r"no label is called 'Mitens' \(did you mean 'Mittens'\?\)"):
        in_numbers("label = 'Mitens'", NAMED)
    with pytest.raises(InputError, match="no class of the model's is called 'Mittens'"):
        in_numbers("predicted IN ('dog', 'Mittens')", NAMED)


NUMERIC = ("label", "predicted", "page", "odd name")


@pytest.mark.parametrize(
    "where",
    [
        "label = 3 AND page > 10",
        "NOT (`label` <> 'dog') OR label is null",
        "(label = 'dog') IS NULL AND predicted = 'owl' IS NOT TRUE",
        "3 <= label AND label<5 and NOT predicted NOT IN ( 1,2 )",
        "label BETWEEN -1 AND 3 OR label IS NOT DISTINCT FROM 2",
        "label = predicted AND label <> page AND `odd name` = label",
        "label = 1 IS NOT TRUE OR coalesce(predicted != 2, false)",
        "path = 'cast(label' OR `cast(label` = 1 OR my_label || '' = 'x' OR info.label = 'y' OR label_is_predicted",
        "label IN (" + ", ".join(["1"] * 20_000) + ")",
    ],
)
def test_plain_comparisons_of_labels_are_taken(where: str):
    check_comparisons(where, in_numbers(where, NAMED), NAMED, NUMERIC)


@pytest.mark.parametrize(
    ("where", "column"),
    [
        ("label || '' = 'dog'", "label"),
        ("cast(label as string) = '0'", "label"),
        ("'0' = cast(`label` AS string)", "label"),
        ("label::string = '0'", "label"),
        ("concat(predicted, '') = 'dog'", "predicted"),
        ("coalesce(label, 0) = 0", "label"),
        ("page > 1 AND label + 1 = 2", "label"),
        ("1 + label = 2", "label"),
        ("label = 0 || ''", "label"),
        ("label > 'a'", "label"),
        ("label = path", "label"),  # numbers with texts
        ("label IN (path)", "label"),
        ("(label) = 'dog'", "label"),
        ("path = 'x' OR lower(predicted) = 'dog'", "predicted"),
    ],
)
def test_other_expressions_on_labels_are_refused_in_words(where: str, column: str):
    with pytest.raises(InputError, match=f"where: expected {column} in a plain comparison"):
        check_comparisons(where, in_numbers(where, NAMED), NAMED, NUMERIC)


def test_a_column_of_metadata_that_is_called_predicted_is_left_alone():
    assert in_numbers("predicted = 'rain'", {"label": NAMED["label"]}) == "predicted = 'rain'"


def test_numbers_of_a_table_are_names_where_the_models_names_are_these_numbers():
    model = Vocabulary(("1", "2", "3", "4"))
    found = match_labels("list.csv", None, model, values=[1, 2, 3], adopt=True)
    assert [found.label(number, "x") for number in (1, 2, 3, None)] == [0, 1, 2, None]
    assert found.notes == (
        "labels of list.csv are numbers: they are taken for names, not for positions, since all are names that the "
        "index knows",
    )
    whole = match_labels("list.csv", None, Vocabulary(("1", "2", "3")), values=[1, 2, 3], adopt=True)
    assert ([whole.label(number, "x") for number in (1, 2, 3)], whole.notes) == ([0, 1, 2], found.notes)
    given = match_labels("list.csv", None, Vocabulary(("2", "1", "0")), values=[0, 2], adopt=True, named=True)
    assert [given.label(number, "x") for number in (0, 2)] == [2, 0]
    positions = match_labels("list.csv", None, ANIMALS, values=[0, 2], adopt=True)
    assert (positions.numbers, len(positions.notes)) == (None, 1)
    assert match_labels("list.csv", None, NUMBERS, values=[0, 2], adopt=True).notes == ()


@pytest.mark.parametrize("model", [ANIMALS, NUMBERS])
def test_numbers_of_a_table_beyond_the_models_classes_are_names(model: Vocabulary):
    found = match_labels("list.csv", None, model, values=[2019, 2020], adopt=True)
    classes = len(model.class_names)
    assert found.vocabulary.others == ("2019", "2020")
    assert [found.label(number, "x") for number in (2019, 2020)] == [classes, classes + 1]
    assert "2019, 2020 are no numbers of the model's" in found.notes[0]
    again = match_labels("more.csv", None, found.vocabulary, values=[2020, 2021])
    assert again.vocabulary.others == ("2019", "2020", "2021")
    counted = match_labels("list.csv", None, model, values=list(range(1, classes + 1)), adopt=True)
    assert counted.notes[0].startswith("warning: ")
    assert "count them from 0" in counted.notes[0]
