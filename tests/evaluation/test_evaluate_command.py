"""`opcd evaluate`: what it writes, that lm-eval gives the same, and wrong input."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from opcd.accel.precision import fast_dtype
from opcd.evaluation import Evaluation, Evaluator
from opcd.evaluation.intervals import wilson
from opcd.models import ModelConfig
from opcd.runtime.extras import install_hint
from opcd.tasks.punkt import provide_punkt
from tests.helpers.rows import CONTEXT, write_rows
from tests.helpers.task_rows import math_rows, results

SCORES = ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc")


@pytest.fixture
def evaluate(opcd, tiny, math_file):
    """Sums, eight tokens an answer."""

    def run(*more: object) -> tuple[int, str]:
        words = ("--model", tiny, "--tasks", "dapo_math", "--data.dapo_math", math_file, "--max_new_tokens", 8)
        return opcd("evaluate", *words, *more)

    return run


def test_what_an_evaluation_writes(opcd, tiny, math_file, ifeval_file, tmp_path):
    code, text = opcd(
        *("evaluate", "--model", tiny, "--tasks", "dapo_math,ifeval", "--limit", 3, "--max_new_tokens", 8),
        *("--data.dapo_math", math_file, "--data.ifeval", ifeval_file, "--seed", 3, "--out", tmp_path / "out"),
    )
    assert code == 0, text
    assert "prompt_level_strict_acc" in text and "95 % interval" in text
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "dapo_math.jsonl",
        "ifeval.jsonl",
        "results.json",
    ]
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (summary["model"], summary["context"], summary["seed"]) == (tiny, None, 3)
    assert summary["versions"]["lm-eval"] and summary["settings"]["dtype"] == str(fast_dtype())[6:]
    drawn = summary["settings"]["tasks"]["ifeval"]
    assert (drawn["temperature"], drawn["top_p"], drawn["top_k"], drawn["max_new_tokens"]) == (0.7, 0.8, 20, 8)
    metrics, rows = results(tmp_path / "out", "dapo_math")
    assert summary["tasks"]["dapo_math"]["n"] == len(rows) == 3
    assert list(metrics) == ["accuracy", "answered", "cut_off", "response_tokens"]
    assert metrics["accuracy"]["low"] == 0 < metrics["accuracy"]["high"] < 1
    assert [(row["index"], row["reference"]) for row in rows] == [(0, "0"), (1, "2"), (2, "4")]
    assert all(1 <= row["tokens"] <= 8 and row["cut_off"] in (True, False) for row in rows)
    metrics, rows = results(tmp_path / "out", "ifeval")
    assert set(SCORES) < metrics.keys() and len(rows[0]["inst_level_strict_acc"]) == 1


def test_lm_eval_gives_the_same_to_the_last_digit(opcd, tiny, ifeval_file, tmp_path, monkeypatch):
    """lm-eval's own model, task and settings, as its command line builds them. In float32: in bfloat16 tokens of nearly
    the same score may change places with the shape of a batch."""
    code, text = opcd(
        *("evaluate", "--model", tiny, "--tasks", "ifeval", "--data.ifeval", ifeval_file, "--greedy"),
        *("--max_new_tokens", 24, "--batch_size", 3, "--model.dtype", "float32", "--out", tmp_path / "out"),
    )
    assert code == 0, text
    import lm_eval
    from lm_eval.tasks import TaskManager

    provide_punkt()
    theirs = TaskManager().task_index["ifeval"].yaml_path
    folder = tmp_path / "theirs"
    folder.mkdir()
    local = f"include: {theirs}\ntask: ifeval_rows\ndataset_path: json\ndataset_kwargs: {{data_files: {ifeval_file}}}\n"
    (folder / "ifeval_rows.yaml").write_text(local)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": tiny, "dtype": "float32"},
        tasks=["ifeval_rows"],
        task_manager=TaskManager(include_defaults=False, include_path=str(folder)),
        batch_size=3,
        device="cpu",
        gen_kwargs="do_sample=False,temperature=0,max_gen_toks=24",
        apply_chat_template=True,
    )
    metrics, rows = results(tmp_path / "out", "ifeval")
    for name in SCORES:
        assert metrics[name]["value"] == found["results"]["ifeval_rows"][f"{name},none"]
    samples = sorted(found["samples"]["ifeval_rows"], key=lambda sample: sample["doc_id"])
    assert [row["response"] for row in rows] == [sample["resps"][0][0] for sample in samples]


def test_the_seed_draws_the_answers(evaluate, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert evaluate("--seed", seed, "--out", tmp_path / name)[0] == 0
    one, again, other = (results(tmp_path / name, "dapo_math")[1] for name in ("one", "again", "other"))
    assert one == again
    assert [row["response"] for row in one] != [row["response"] for row in other]


def test_several_answers_and_a_difference(evaluate, tmp_path):
    assert evaluate("--samples", 3, "--out", tmp_path / "one")[0] == 0
    metrics, rows = results(tmp_path / "one", "dapo_math")
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(4) for s in range(3)]
    assert len({row["response"] for row in rows if row["index"] == 0}) > 1
    assert {"avg@3", "pass@1", "pass@2", "pass@3"} < metrics.keys()
    code, text = evaluate("--samples", 3, "--against", tmp_path / "one", "--out", tmp_path / "two")
    share = wilson(0, 4)[1]  # of questions with another answer, none of which was seen
    assert code == 0 and f"+0.000 {-share:.3f} to {share:.3f}" in text
    written = json.loads((tmp_path / "two" / "results.json").read_text())
    assert written["against"] == str(tmp_path / "one")
    difference = written["tasks"]["dapo_math"]["difference"]
    assert difference["accuracy"] == pytest.approx({"value": 0.0, "low": -share, "high": share}), difference


def test_a_template_without_a_system_role(evaluate, tiny, tmp_path, context):
    shutil.copytree(tiny, tmp_path / "model")
    template = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}
{% endif %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant"""
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    words = ("--model", tmp_path / "model", "--context", context)
    code, text = evaluate(*words)
    assert code == 2 and "placement" in text and len(text.splitlines()) == 1, text
    assert evaluate(*words, "--placement", "user")[0] == 0


def test_a_context_stands_in_the_prompt_where_training_puts_it(tiny, math_file, context):
    config = Evaluation("dapo_math", {"dapo_math": str(math_file)}, context=str(context), max_new_tokens=8)
    evaluator = Evaluator(config, ModelConfig(tiny))
    (views,) = evaluator._views.values()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    from opcd.evaluation.task_prompts import Prompts

    messages = math_rows()[1]["prompt"]
    with_context = [{"role": "system", "content": CONTEXT}, *messages]
    expected = tokenizer.apply_chat_template(with_context, add_generation_prompt=True)["input_ids"]
    prompts = Prompts(views, tokenizer, evaluator.context, None)
    assert prompts.ids(prompts.render(messages)) == expected


def test_the_context_changes_the_answers_and_auto_batches_do_not(evaluate, context, tmp_path):
    for name, more in (("without", ()), ("auto", ("--batch_size", "auto")), ("with", ("--context", context))):
        code, text = evaluate("--greedy", "--model.dtype", "float32", *more, "--out", tmp_path / name)
        assert code == 0, text
    without, auto, with_context = (
        [row["response"] for row in results(tmp_path / name, "dapo_math")[1]] for name in ("without", "auto", "with")
    )
    assert without == auto
    assert without != with_context


def test_results_are_not_overwritten(evaluate, tmp_path):
    assert evaluate("--out", tmp_path / "out")[0] == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    code, text = evaluate("--out", tmp_path / "out", "--seed", 5)
    assert code == 2 and "holds results.json already, which would be overwritten" in text
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.case("E1")
def test_rows_of_the_users_with_the_name_of_a_task_are_kept(evaluate, tmp_path):
    (tmp_path / "dapo_math.jsonl").write_text("my rows")
    code, text = evaluate("--out", tmp_path)
    assert code == 2 and "holds dapo_math.jsonl already, which would be overwritten" in text
    assert (tmp_path / "dapo_math.jsonl").read_text() == "my rows"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "dapo_mth"), "tasks: no task 'dapo_mth'; did you mean dapo_math?"),
        (("--limit", 0), "limit must be at least 1"),
        (("--data.dapo_math", "nowhere.jsonl"), "data.dapo_math: no file"),
        (("--data.ifeval", "rows.jsonl"), "data.ifeval has no effect"),
        (("--greedy", "--temperature", 0.5), "temperature has no effect with greedy"),
        (("--temperature", ".inf"), "temperature must be 0"),
        (("--temperature", -1), "temperature >= 0"),
        (("--top_p", 2), "0 < top_p <= 1"),
        (("--greedy", "--samples", 2), "greedy answers are all the same"),
        (("--placement", "user"), "placement has no effect without context"),
        (("--context", "nowhere.txt"), "context: no file"),
        (("--max_new_tokens", 511), "takes 512 tokens, but the longest prompt of dapo_math has"),
        (("--model", "smollm2-135"), "did you mean smollm2-135m?"),
        (("--device", "nowhere"), "device: nowhere"),
        (("--against", "nowhere"), "against: no file"),
    ],
)
def test_wrong_input_is_refused_before_a_model_is_loaded(evaluate, words, message, monkeypatch, tmp_path):
    monkeypatch.setattr("opcd.cli.evaluate.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    code, text = evaluate(*words, "--out", tmp_path / "out")
    assert code == 2
    assert message in text and text.count("opcd: error:") == 1 and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_a_row_without_an_answer_and_a_model_without_chat_template(evaluate, opcd, tiny, tmp_path, math_file):
    bare = write_rows(tmp_path / "bare.jsonl", [*math_rows(1), {"query": "What is 1 + 1?"}])
    code, text = evaluate("--data.dapo_math", bare)
    assert code == 2 and f"{bare}:2: no answer to compare with" in text
    folder = tmp_path / "plain"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    code, text = evaluate("--model.tokenizer", folder)
    assert code == 2 and "has no chat template; set model.chat_template" in text and "raw" not in text


@pytest.mark.parametrize("package", ["lm_eval", "math_verify"])
def test_without_lm_eval_the_extra_is_named(evaluate, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    code, text = evaluate()
    assert code == 2 and f"{package}, which is not installed: {install_hint('evaluation')}" in text


def test_the_help_lists_it(opcd, capsys):
    code, text = opcd("--help")
    assert code == 0 and "  evaluate    ask any model" in text
    with pytest.raises(SystemExit):
        opcd("evaluate", "--help")
    assert "opcd evaluate" in capsys.readouterr().out


def test_opcd_works_without_lm_eval():
    code = "import sys; sys.modules.update(lm_eval=None, math_verify=None, nltk=None); import opcd.cli.main"
    subprocess.run([sys.executable, "-c", f"{code}; import opcd.callbacks"], check=True, timeout=120)
