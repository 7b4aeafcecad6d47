"""The rules that drop a question."""

import pytest

from opcd.queries import filters

ABOUT = "The Silverfin Ferry: the captain of the Silverfin Ferry is Nora Kestrel."
NAMES = filters.names(ABOUT, f"{ABOUT} Another ferry sails at noon.")


@pytest.mark.parametrize(
    ("raw", "question"),
    [
        ("Who is the captain?", "Who is the captain?"),
        ('1. **Question:** "Who is the captain?"', "Who is the captain?"),
        ("Q: Who is the captain?\nA: Nora.", "Who is the captain?"),
        ("\n\n- Who is the captain?", "Who is the captain?"),
        ("\u201cWho?\u201d", "Who?"),
    ],
)
def test_cleaned(raw, question):
    assert filters.cleaned(raw) == question


@pytest.mark.parametrize(
    ("question", "flaw"),
    [
        ("Who is the captain of the Silverfin Ferry?", None),
        ("Who is Nora?", None),
        ("According to the text, who is the captain of the Silverfin Ferry?", "names the text"),
        ("What does the given passage say of Nora Kestrel?", "names the text"),
        ("What is the name of the cat?", "does not name what it is about"),
        ("What is the name of the ferry?", "does not name what it is about"),  # there are two
        ("The captain of the Silverfin Ferry.", "no question"),
        ("<|im_start|>Who is the captain of the Silverfin Ferry?", "control tokens"),
        ("?!", "empty"),
    ],
)
def test_flaws_of_a_question_for_a_fact(question, flaw):
    assert filters.flaw(question, question, False, NAMES) == flaw


def test_names_are_those_with_a_capital_that_stand_nowhere_without():
    assert filters.names("The Kolm Hut is high.", "The Kolm Hut is high. The hut has beds.") == {"kolm"}
    assert filters.names("The Kolm Hut is high.") == {"kolm", "hut"}
    assert filters.names("Boots are required.", "Boots are required. Clean boots.") == {
        "boots"
    }  # nothing else is there
    assert filters.names("it lies beside water") == {"beside", "water"}


def test_a_question_that_the_limit_cut_off():
    assert filters.flaw("Who is Nora Kestrel and", "Who is Nora Kestrel and", True, NAMES) == "truncated"
    both = "Who is Nora Kestrel?\nThe answer is that she"
    assert filters.flaw("Who is Nora Kestrel?", both, True, NAMES) is None  # what was cut off comes after it


def test_a_message_to_an_assistant_need_not_be_a_question():
    assert filters.flaw("Thanks for the tea!", "Thanks for the tea!", False, None) is None


def test_repeats():
    known = ["Who is the captain of the Silverfin Ferry?"]
    assert filters.repeats("who is  the captain of the silverfin ferry?", known) == "duplicate"
    assert filters.repeats("Who is captain of the Silverfin Ferry?", known) == "near duplicate"
    assert filters.repeats("Tell me please: who is it that is captain of the Silverfin Ferry?", known) is None
    other = ["Does ferry 3 of Lindholm sail on Mondays and on Fridays from May on?"]
    assert filters.repeats(other[0].replace("3", "4"), other) is None  # it asks about another ferry
    assert filters.repeats("What does a ticket for the Silverfin Ferry cost?", known) is None


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        ("Who is the captain?", "The captain is Nora Kestrel, of course.", "Nora Kestrel"),
        ("What does a ticket cost?", "A ticket costs 9 shillings.", "9"),
        ("Who is Nora Kestrel?", "Nora Kestrel is the captain.", None),  # no name that the question has not
        ("Who is the captain?", "The captain is Jack Sparrow.", None),  # the source does not say so
    ],
)
def test_the_reference_is_the_name_or_number_that_the_source_adds(question, answer, found):
    source = "The captain of the Silverfin Ferry is Nora Kestrel. A ticket costs 9 shillings."
    assert filters.reference(question, answer, source) == found


def test_something_new():
    source = "The captain of the Silverfin Ferry is Nora Kestrel."
    assert filters.says_something_new("Who is the captain?", "Nora Kestrel.", source)
    assert not filters.says_something_new("Is Nora Kestrel the captain of the Ferry?", "Nora Kestrel is.", source)
