"""When an answer counts as right."""

import pytest

from opcd.tasks.matching import holds, right


@pytest.mark.case("C26")
@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("It is ODALYS.", "Odalys"),
        ("Odalys\u2019s boat, Odalys's boat", "Odalys"),
        ("l\u2019Odalys", "Odalys"),
        ("Martha\n  Vale", "Martha Vale"),
        ("**5**", "5"),
        ("(5)", "5"),
        ("$5 or 5%", "5"),
        ("at 5 AM", "5"),
        ("x=5", "5"),
        ("5.", "5"),
        ("It is 1. May I help?", "1"),
        ("on the 1  may", "1 May"),
        ("13 of them, on 3 May: 3", "3"),
        ("founded on 21 May 1908, opened in June 1931", "1908"),
        ("since Sept. 1931", "1931"),
        ("-5", "-5"),
        ("1,005", "1,005"),
        ("C++ is", "C++"),
        ("in May", "May"),
    ],
)
def test_an_answer_holds_the_reference(answer, reference):
    assert holds(answer, reference)
    assert right({"answer": answer, "reference": reference})


@pytest.mark.case("C26")
@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("It is Marta.", "Odalys"),
        ("140", "14"),
        ("5:30, 5.20, 1,005, 1,5, -5, 5/2, 2/5, 3-5, 5\u20137, 5e3, 5²", "5"),
        ("on 1 May, May 1, 1 of May, Sept. 1, the 1st of May", "1"),
        ("10 000 or 10\u00a0000", "10"),
        ("10 000", "000"),
        ("1 million, 1 dozen", "1"),
        ("13 May", "3 May"),
        ("twenty-one, one-way", "one"),
        ("the Mayor", "May"),
        ("don't", "don"),
        ("anything", ""),
        ("anything", " "),
    ],
)
def test_a_part_of_another_word_or_number_is_no_match(answer, reference):
    assert not holds(answer, reference)


def test_without_a_reference_nothing_is_right():
    assert not right({"answer": "Odalys", "reference": None})
