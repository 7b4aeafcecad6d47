"""A key of an earlier version is answered by its new name."""

import pytest

from opcd.runtime.did_you_mean import RENAMED, nearest_key


@pytest.mark.parametrize(
    ("words", "now"),
    [
        (["--model.answer.max_new_tokens", "4"], "did you mean --model.eval_sampling.max_new_tokens?"),
        (["--model.halve_micro_batches", "true"], "did you mean --model.shrink_on_oom?"),
        (["--trainer.callbacks+=Alarms", "--trainer.callbacks.ended", "0.2"], "did you mean finished_fraction?"),
        (["--model.loss=SampledReverseKL", "--model.loss.max_importance", "2"], "did you mean importance_clip?"),
        (["--trainer.strategy", "ModelParallelStrategy"], "use ddp, or fsdp2"),
        (["--model.teacher.attention", "flex_attention"], "it was removed; sdpa scores rows behind a shared context"),
    ],
)
def test_an_old_option(opcd, rows, context, words, now):
    code, text = opcd("fit", "--data.train", rows, "--data.context", context, *words)
    assert code == 2 and now in text, text


def test_an_old_key_of_a_recipe(opcd, rows, tmp_path):
    recipe = tmp_path / "old.yaml"
    recipe.write_text("model: {bad_numbers: {action: skip}}\n")
    code, text = opcd("fit", "--config", recipe, "--data.train", rows)
    assert code == 2 and "no key model.bad_numbers.action; did you mean model.on_nonfinite.action?" in text, text


def test_an_old_value_of_a_recipe(opcd, rows, tmp_path):
    recipe = tmp_path / "old.yaml"
    recipe.write_text("model: {student: {attention: flex_attention}}\n")
    code, text = opcd("fit", "--config", recipe, "--data.train", rows)
    assert code == 2 and "model.student.attention: " in text and "flex_attention (it was removed; sdpa" in text, text


def test_a_name_that_is_still_there_stays(opcd):
    assert nearest_key("model.answer", ["model.answers", "model.eval_sampling"]) == "model.eval_sampling"
    assert nearest_key("model.los", ["model.loss"]) == "model.loss"
    assert not set(RENAMED) & set(RENAMED.values())
