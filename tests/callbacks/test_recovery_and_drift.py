"""Recovery and drift: their definitions in float64, that measuring changes no training, resuming, and what is said."""

import json
from functools import partial

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from opcd.callbacks import Alarms, ExactResume, RecoveryAndDrift
from opcd.callbacks.recovery_and_drift import Measurement, _recovery
from opcd.data import ContextQueryDataModule
from opcd.losses import ForwardKL, TopK, as_head
from opcd.models import ModelConfig
from opcd.modules import Distiller, FrozenTeacher, RoutedTeachers, Sampling, Student, StudentRollout, fixed_responses
from opcd.modules.fixed_responses import KEPT, Divergences, FixedResponses, likeliest
from opcd.modules.lm.hidden_states import HiddenStates
from tests.helpers.rows import write_rows
from tests.helpers.training import trainer

SHORT = Sampling(max_new_tokens=6)
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}


def distiller_of(tiny, teacher=None, lr=1e-2):
    return Distiller(
        ModelConfig(name=tiny),
        teacher,
        loss=ForwardKL(),
        rollout=StudentRollout(SHORT),
        optimizer=partial(torch.optim.AdamW, lr=lr),
    )


def data_of(rows, context, **options):
    return ContextQueryDataModule(train=str(rows), val=str(rows), context=str(context), batch_size=4, **options)


def lines(folder):
    return [json.loads(line) for line in (folder / "recovery.jsonl").read_text().splitlines()]


def log_probs(model, prompt, response):
    """[R, V] in float64: the definition."""
    ids = torch.cat([prompt, response])[None, :-1]
    return model.double()(ids).logits[0, -len(response) :].log_softmax(-1)


def reference(model_of, prompts, other_of, others, responses):
    """Sum over the tokens of KL(model || other), a number a response."""
    found = []
    for prompt, other, response in zip(prompts, others, responses, strict=True):
        p, q = log_probs(model_of, prompt, response), log_probs(other_of, other, response)
        found.append(float((p.exp() * (p - q)).sum()))
    return found


def test_recovery_and_drift_are_those_of_the_definition(tmp_path, rows, context, tiny, monkeypatch):
    monkeypatch.setattr(fixed_responses, "KEPT", 10**6)  # random weights give all tokens much the same probability
    measure = RecoveryAndDrift(queries=5, general_prompts=3, max_new_tokens=7)
    distiller = distiller_of(tiny)
    trainer(tmp_path, steps=4, callbacks=[measure]).fit(distiller, data_of(rows, context))
    taught, general = measure._taught, measure._general
    assert len(taught) == 5 and len(general) == 3
    base = Student.load(ModelConfig(name=tiny)).model.eval()
    after = distiller.student.model.eval()
    with torch.no_grad():
        seen, unseen = taught.teacher_prompts, taught.student_prompts
        responses = [row.response for row in taught.rows]
        tokens = sum(map(len, responses))
        effect = sum(reference(base, seen, base, unseen, responses)) / tokens
        left = sum(reference(base, seen, after, unseen, responses)) / tokens
        answers = [row.response for row in general.rows]
        prompts = general.student_prompts
        drift = sum(reference(base, prompts, after, prompts, answers)) / sum(map(len, answers))
    first, *_, last = lines(tmp_path)
    assert first["step"] == 0 and first["effect"] == first["left"] and first["drift"] == 0
    assert last["step"] == 4
    assert last["effect"] == pytest.approx(effect, rel=1e-4)
    assert last["left"] == pytest.approx(left, rel=1e-4)
    assert last["drift"] == pytest.approx(drift, rel=1e-4)
    assert last["recovery"] == pytest.approx(1 - left / effect, abs=1e-4)
    assert last["drift"] > 0.01 and last["drift_low"] < last["drift"] < last["drift_high"]
    assert last["recovery_low"] <= last["recovery"] <= last["recovery_high"]


def test_kept_tokens_and_the_rest_are_at_most_the_whole_vocabulary_and_near_it():
    torch.manual_seed(0)
    p, q = (torch.randn(40, 4 * KEPT) * 3 for _ in range(2))
    recorded = likeliest(HiddenStates(p, as_head(torch.eye(4 * KEPT))), KEPT, 4 * KEPT)
    assert bool((recorded.log_probs.diff(dim=-1) <= 0).all())
    loss = TopK(ForwardKL(), KEPT, support="teacher")
    part = loss.values_of_record(q.log_softmax(-1), *recorded.rows)["divergence"].double()
    of_all_p, of_all_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    whole = (of_all_p.exp() * (of_all_p - of_all_q)).sum(-1)
    assert bool((part <= whole + 1e-4).all()) and 0.95 < float(part.mean() / whole.mean()) < 0.999


def test_the_answers_and_prompts_are_the_same_in_every_run(tmp_path, rows, context, tiny):
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        measure = RecoveryAndDrift(general_prompts=2, max_new_tokens=4)
        trainer(tmp_path / str(seed), callbacks=[measure]).fit(distiller_of(tiny), data_of(rows, context))
        found.append([row.response.tolist() for row in [*measure._taught.rows, *measure._general.rows]])
    assert found[0] == found[1]


def test_measuring_changes_no_weight(tmp_path, rows, context, tiny):
    weights = []
    for number, callbacks in enumerate(([], [RecoveryAndDrift(general_prompts=2, max_new_tokens=4)])):
        torch.manual_seed(0)
        distiller = distiller_of(tiny)
        run = trainer(tmp_path / str(number), steps=4, callbacks=callbacks, val_check_interval=1)
        run.fit(distiller, data_of(rows, context))
        weights.append(distiller.student.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_measures_after_every_validation_and_shows_it(tmp_path, rows, context, tiny):
    measure = RecoveryAndDrift(general_prompts=2, max_new_tokens=4)
    run = trainer(tmp_path, steps=3, callbacks=[measure], val_check_interval=1, num_sanity_val_steps=1)
    run.fit(distiller_of(tiny), data_of(rows, context))
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert float(run.callback_metrics["context/recovery"]) == pytest.approx(lines(tmp_path)[-1]["recovery"])
    assert "context/drift" in run.progress_bar_metrics


@pytest.mark.filterwarnings("ignore:.*pre-optimization state was saved", "ignore:The dirpath has changed")
def test_a_resumed_run_compares_with_its_start(tmp_path, rows, context, tiny):
    def fit(folder, ckpt_path=None):
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [ExactResume(), keep, RecoveryAndDrift(general_prompts=2, max_new_tokens=4)]
        torch.manual_seed(0 if ckpt_path is None else 1)
        run = Trainer(max_steps=4, callbacks=callbacks, default_root_dir=folder, **QUIET)
        run.fit(distiller_of(tiny), data_of(rows, context), ckpt_path=ckpt_path)
        return lines(folder)

    whole, resumed = fit(tmp_path / "whole"), fit(tmp_path / "rest", tmp_path / "whole/step=3.ckpt")
    assert [line["step"] for line in whole] == [0, 2, 4]
    assert resumed == whole


def test_a_checkpoint_without_the_start_is_not_compared(tmp_path, rows, context, tiny, caplog):
    first = Trainer(max_steps=1, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET)
    first.fit(distiller_of(tiny), data_of(rows, context))
    first.save_checkpoint(tmp_path / "last.ckpt")
    measure = RecoveryAndDrift(general_prompts=2, max_new_tokens=4)
    run = trainer(tmp_path, steps=2, callbacks=[measure])
    with caplog.at_level("INFO"):
        run.fit(distiller_of(tiny), data_of(rows, context), ckpt_path=tmp_path / "last.ckpt")
    assert not measure.measured and "does not hold what the run began with" in caplog.text


def test_several_teachers_record_their_own_rows(tmp_path, context, tiny, tiny_teacher):
    rows = [{"query": f"What is {n} + {n}?", "teacher": "ab"[n % 2]} for n in range(5)]
    file = write_rows(tmp_path / "routed.jsonl", rows)
    models = {name: ModelConfig(name=folder) for name, folder in (("a", tiny), ("b", tiny_teacher))}
    teacher = RoutedTeachers({name: FrozenTeacher(model) for name, model in models.items()})
    measure = RecoveryAndDrift(general_prompts=0, max_new_tokens=4)
    data = data_of(file, context, teacher=teacher.models)
    trainer(tmp_path, callbacks=[measure]).fit(distiller_of(tiny, teacher), data)
    with torch.no_grad():
        for row, one in enumerate(measure._taught.rows):
            model = Student.load(list(models.values())[row % 2]).model.eval()
            expected = log_probs(model, one.teacher_prompt, one.response)
            recorded = measure._taught.reference[row]
            found = expected.gather(-1, recorded.tokens)
            torch.testing.assert_close(recorded.log_probs.double(), found, atol=1e-4, rtol=0)
    assert lines(tmp_path)[-1]["drift"] is None


def test_a_teacher_that_does_not_write_scores_the_students_answers_with_the_context(tmp_path, rows, context, tiny):
    class Silent(FrozenTeacher):
        writes = False

        def generate(self, *args):
            raise AssertionError

    measures = [RecoveryAndDrift(general_prompts=0, max_new_tokens=4) for _ in range(2)]
    for number, (measure, teacher) in enumerate(zip(measures, (Silent(), FrozenTeacher()), strict=True)):
        trainer(tmp_path / str(number), callbacks=[measure]).fit(distiller_of(tiny, teacher), data_of(rows, context))
    first, second = (measure.measured[0].effect for measure in measures)
    assert first == pytest.approx(second)  # the two models are the same


@pytest.mark.filterwarnings("always:with the context")
def test_warns_of_a_context_without_effect_and_of_a_teacher_that_is_wrong(tmp_path, context, tiny, recwarn):
    file = write_rows(tmp_path / "known.jsonl", [{"query": f"{n}?", "reference": "Quillhaven"} for n in range(4)])
    measure = RecoveryAndDrift(general_prompts=0, max_new_tokens=4)
    trainer(tmp_path, callbacks=[measure]).fit(distiller_of(tiny), data_of(file, context))
    said = " ".join(str(warning.message) for warning in recwarn)
    assert "right on 0 of 4 queries" in said
    assert ("hardly anything to learn" in said) == (measure.measured[0].effect < 0.02)


def test_no_share_of_nothing():
    assert "recovery" not in _recovery(Divergences([0.01, 0.01], [2, 2]), Divergences([0.01, 0.0], [2, 2]))
    assert _recovery(Divergences([1.0, 1.0], [2, 2]), Divergences([float("nan"), 0.0], [2, 2])) == {}
    half = _recovery(Divergences([1.0, 0.0], [2, 2]), Divergences([0.5, 0.0], [2, 2]))  # a draw of the second alone
    assert half["recovery"] == half["recovery_low"] == half["recovery_high"] == 0.5


def test_sentence_names_both_figures_with_their_intervals():
    said = Measurement(9, "val", 6, 0.74, 0.1, 0.865, 0.8, 0.92, 32, 0.0654, 0.05, 0.08).sentence()
    assert "effect in the weights: 86% (95 %: 80% to 92%), on 6 queries of data.val" in said
    assert "(0.740 nats a token at the start, 0.100 left)" in said
    assert "drift: 0.065 (95 %: 0.050 to 0.080), on 32 general prompts, nats a token" in said


def test_state_keeps_every_number(tmp_path, rows, context, tiny):
    measure = RecoveryAndDrift(general_prompts=1, max_new_tokens=4)
    distiller = distiller_of(tiny)
    trainer(tmp_path, callbacks=[measure]).fit(distiller, data_of(rows, context))
    again = FixedResponses.from_state_dict(measure._taught.state_dict(), torch.device("cpu"))
    assert again.divergences(distiller.student, 4096) == measure._taught.divergences(distiller.student, 4096)


@pytest.mark.filterwarnings("always:.*answers to general prompts have moved by")
@pytest.mark.parametrize(("limit", "warned"), [(1e-6, 1), (1e6, 0)])
def test_alarms_warn_once_of_drift(tmp_path, rows, context, tiny, recwarn, limit, warned):
    callbacks = [RecoveryAndDrift(queries=1, general_prompts=2, max_new_tokens=4), Alarms(drift=limit)]
    run = trainer(tmp_path, steps=3, callbacks=callbacks, val_check_interval=1)
    run.fit(distiller_of(tiny), data_of(rows, context))
    said = [str(warning.message) for warning in recwarn if "general prompts have moved by" in str(warning.message)]
    assert len(said) == warned and all("step 1: " in text for text in said)


@pytest.mark.parametrize("options", [{"queries": 0}, {"general_prompts": 65}, {"max_new_tokens": 0}])
def test_wrong_numbers(options):
    with pytest.raises(ValueError, match="RecoveryAndDrift wants"):
        RecoveryAndDrift(**options)
