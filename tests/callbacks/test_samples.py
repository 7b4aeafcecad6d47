"""What the table of answers counts and shows."""

import pytest
import torch
from lightning import Trainer
from rich.console import Console

from opcd.callbacks import AnswerSamples
from opcd.callbacks.answer_samples import print_table
from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import Distiller, Sampling
from opcd.tasks.matching import right


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


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_samples_compute_in_the_trainers_precision_as_predictions_do(tmp_path, rows, context, tiny, precision, dtype):
    distiller = Distiller(ModelConfig(name=tiny), eval_sampling=Sampling(max_new_tokens=4, temperature=0.0))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"accelerator": "cpu", "precision": precision, "logger": False, "default_root_dir": tmp_path, **quiet}
    data = ContextQueryDataModule(train=str(rows), predict=str(rows), context=str(context), batch_size=8)
    seen = []

    class Head(AnswerSamples):
        """Notes the type of all logits that are computed while it asks."""

        def _ask(self, trainer, pl_module, context):
            hook = pl_module.student.model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
            super()._ask(trainer, pl_module, context)
            hook.remove()

    samples = Head(queries=2)
    Trainer(max_steps=1, callbacks=[samples], **options).fit(distiller, data)
    assert set(seen) == {dtype}
    predicted = Trainer(**options).predict(distiller, data)
    after = [row["answer"] for row in samples.rows if row["step"] == 1]
    assert after == [row["answer"] for batch in predicted for row in batch][:2]
