"""What the table of answers counts and shows."""

from rich.console import Console

from opcd.callbacks.samples import print_table, right


def row(step, context, answer, reference="Odalys"):
    return {"step": step, "context": context, "query": "Who?", "reference": reference, "answer": answer}


def test_right_is_the_reference_inside_the_answer_in_any_case():
    assert right(row(0, False, "It is ODALYS."))
    assert not right(row(0, False, "It is Marta."))
    assert not right(row(0, False, "It costs 140 crowns.", reference="14"))
    assert right(row(0, False, "It costs 14 crowns.", reference="14"))
    assert right(row(0, False, "Crowns: 14.", reference="14"))
    for other in ("At 5:30.", "It costs 5.20.", "1,005 of them", "1,5"):
        assert not right(row(0, False, other, reference="5"))
    assert not right(row(0, False, "Odalys", reference=None))


def test_table_counts_before_after_and_with_the_context():
    rows = [row(0, False, "no"), row(0, False, "no"), row(0, True, "odalys"), row(0, True, "Odalys")]
    rows += [row(9, False, "[bold]Odalys"), row(9, False, "no")]
    console = Console(record=True, width=160)
    print_table(rows, console)
    text = console.export_text()
    assert "before: 0 of 2 right" in text
    assert "after 9 steps: 1 of 2 right" in text
    assert "with context, before: 2 of 2 right" in text
    assert "[bold]Odalys" in text  # an answer is text, not markup
