"""Tasks of a folder of the user's, of lm-eval, and for a user's own rows, through `opcd evaluate`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from opcd.evaluation import Evaluation, Evaluator
from opcd.evaluation.intervals import wilson
from opcd.models import ModelConfig
from opcd.runtime.errors import UserError
from opcd.tasks.matching import holds
from tests.helpers.paths import ROOT
from tests.helpers.rows import write_rows
from tests.helpers.task_rows import results

FACTS = [
    {"question": f"What is {n} + {n}?", "answer": str(2 * n), "options": [str(2 * n + 1), str(2 * n), "none of them"]}
    for n in range(6)
]
ASKED = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
description: Be brief.
doc_to_text: "Question: {{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
metadata: {version: 2.0}
"""
CHOSEN = """task: sums_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: options
doc_to_target: "{{options.index(answer)}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: f1, aggregation: f1, higher_is_better: true}
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """A cache of `datasets` of our own."""
    folder = tmp_path / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A user's folder: a task that generates and one that chooses, with JSON rows of their own."""
    made = tmp_path / "mine"
    made.mkdir()
    rows = write_rows(made / "rows.jsonl", FACTS)
    for name, text in (("sums", ASKED), ("sums_choice", CHOSEN)):
        (made / f"{name}.yaml").write_text(text.replace("FILE", str(rows)))
    return made


@pytest.fixture
def evaluate(opcd, tiny):
    """The tiny model in float32."""
    return lambda *words: opcd("evaluate", tiny, "--model.dtype", "float32", *words)


def lm_evals(tiny: str, task: str, manager: TaskManager, **options: object) -> dict:
    """What lm-eval's own command gives."""
    import lm_eval

    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": tiny, "dtype": "float32"},
        tasks=[task],
        task_manager=manager,
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
        **options,
    )


@pytest.mark.parametrize("chat", [None, True, False])
def test_a_folder_of_the_users_gives_lm_evals_values(evaluate, tiny, folder, tmp_path, chat):
    words = () if chat is None else ("--apply_chat_template", str(chat).lower())
    code, text = evaluate(
        *("--include_path", folder, "--tasks", "sums,sums_choice", "--max_new_tokens", 24, "--batch_size", 3, *words),
        *("--out", tmp_path / "out"),
    )
    assert code == 0, text
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    for task, by_default, names in (("sums", True, ("exact_match", "bleu")), ("sums_choice", False, ("acc", "f1"))):
        templated = by_default if chat is None else chat
        theirs = lm_evals(
            tiny, task, manager, apply_chat_template=templated, fewshot_as_multiturn=templated,
            **({"gen_kwargs": "max_gen_toks=24"} if task == "sums" else {}),
        )  # fmt: skip
        metrics, rows = results(tmp_path / "out", task)
        samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
        for name in names:
            assert metrics[name]["value"] == pytest.approx(theirs["results"][task][f"{name},none"], abs=1e-12)
        assert metrics[names[0]]["low"] is not None and "note" not in metrics[names[0]]
        assert (metrics[names[1]]["low"], metrics[names[1]]["note"][:27]) == (None, "computed over all rows toge")
        assert [row["reference"] for row in rows] == [fact["answer"] for fact in FACTS]
        settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["tasks"][task]
        assert settings["apply_chat_template"] is templated and settings["file"] == str(folder / f"{task}.yaml")
        if task == "sums":
            assert [row["response"] for row in rows] == [sample["resps"][0][0] for sample in samples]
            assert any("e" not in row["response"] and not row["cut_off"] and row["tokens"] < 24 for row in rows)
        else:
            assert [row["choices"] for row in rows] == [fact["options"] for fact in FACTS]
            for row, sample in zip(rows, samples, strict=True):
                expected = [float(resps[0][0]) for resps in sample["resps"]]
                assert row["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
                assert row["response"] == row["choices"][expected.index(max(expected))]
    assert "a row has no score of its own" in " ".join(text.replace("│", " ").split())


def test_a_context_stands_in_both(evaluate, folder, context, tmp_path):
    words = ("--include_path", folder, "--tasks", "sums,sums_choice", "--max_new_tokens", 8)
    assert evaluate(*words, "--out", tmp_path / "without")[0] == 0
    code, text = evaluate(*words, "--context", context, "--out", tmp_path / "with", "--against", tmp_path / "without")
    assert code == 0, text
    for task, key, metric in (("sums", "response", "exact_match"), ("sums_choice", "log_likelihoods", "acc")):
        without, informed = (results(tmp_path / name, task)[1] for name in ("without", "with"))
        assert [row[key] for row in without] != [row[key] for row in informed]
        assert all(one["query"] == other["query"] for one, other in zip(without, informed, strict=True))
        summary = json.loads((tmp_path / "with" / "results.json").read_text())["tasks"][task]
        assert summary["difference"][metric]["low"] < summary["difference"][metric]["high"]


def test_samples_of_a_task_that_is_greedy_are_drawn_where_a_temperature_is_set(evaluate, folder, tmp_path):
    words = ("--include_path", folder, "--tasks", "sums", "--max_new_tokens", 8, "--samples", 2)
    code, text = evaluate(*words)
    assert code == 2 and "samples: the answers to sums are the same each time; set temperature, or leave" in text
    code, text = evaluate(*words, "--temperature", 1, "--out", tmp_path / "out")
    assert code == 0, text
    metrics, rows = results(tmp_path / "out", "sums")
    assert {"avg@2", "pass@1", "pass@2"} < metrics.keys() and len(rows) == 2 * len(FACTS)
    assert any(one["response"] != other["response"] for one, other in zip(rows[::2], rows[1::2], strict=True))


def test_code_of_the_folder_runs_only_for_a_task_that_is_asked(evaluate, folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\ndef text(doc): return 'x'\n"
    )
    (folder / "coded.yaml").write_text(
        (folder / "sums.yaml").read_text().replace("task: sums", "task: coded")
        .replace('"Question: {{question}}"', "!function code.text")
    )  # fmt: skip
    words = ("--include_path", folder, "--max_new_tokens", 2)
    assert evaluate("--tasks", "sums", *words)[0] == 0 and not ran.exists()
    assert evaluate("--tasks", "coded", *words)[0] == 0 and ran.exists()


def test_a_name_that_opcd_has_too_is_the_folders(evaluate, folder, tmp_path):
    text = (folder / "sums.yaml").read_text()
    (folder / "ifeval.yaml").write_text(text.replace("task: sums", "task: ifeval"))
    code, text = evaluate(
        *("--include_path", folder, "--tasks", "ifeval", "--max_new_tokens", 2, "--out", tmp_path / "out"),
    )
    assert code == 0, text
    assert "exact_match" in results(tmp_path / "out", "ifeval")[0]


@pytest.mark.parametrize(
    ("changed", "words", "message"),
    [
        (None, ("--include_path", "nowhere"), "include_path: no folder "),
        (("other.txt", ""), ("--include_path", "."), "has no .yaml file: a task of lm-eval is one"),
        (("sums.yaml", "task: sums\nmetric_list: ["), (), "tasks: sums: cannot read "),
        (("sums.yaml", ASKED.replace("FILE", "nowhere.jsonl")), (), "tasks: sums cannot be loaded: FileNotFoundError"),
        (
            ("sums.yaml", ASKED.replace("exact_match", "exact_mtch")),
            (),
            "no metric 'exact_mtch'; did you mean exact_match?",
        ),
        (("sums.yaml", ASKED + "unsafe_code: true\n"), (), "tasks: sums cannot be asked here: it runs code that the m"),
        (("sums.yaml", ASKED + "repeats: 3\n"), (), "sums cannot be asked here: it asks each question several times"),
        (
            ("sums.yaml", ASKED.replace("{until", "{num_beams: 4, until")),
            (),
            "sums: generation_kwargs: num_beams is no setting of opcd's decoding",
        ),
        (("sums.yaml", ASKED + "process_docs: !function gone.docs\n"), (), "tasks: sums "),
        (None, ("--tasks", "sms"), "tasks: no task 'sms'; did you mean sums?"),
        (None, ("--data.sums", "rows.jsonl"), "data.sums has no effect: sums reads json; remove it"),
        (
            None,
            ("--tasks", "sums_choice", "--samples", 2),
            "samples: the answers to sums_choice are the same each time",
        ),
        (None, ("--tasks", "sums_choice", "--greedy"), "greedy has no effect: no text is generated for sums_choice"),
        (None, ("--tasks", "sums_choice", "--temperature", 1), "temperature has no effect: no text is generated"),
        (None, ("--model.chat_template", "nowhere"), "model.chat_template"),
    ],
)
def test_wrong_input_is_one_message(evaluate, folder, changed, words, message, monkeypatch, tmp_path):
    monkeypatch.setattr("opcd.cli.evaluate.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if changed is not None:
        rows = str(folder / "rows.jsonl")
        (folder / changed[0]).write_text(changed[1].replace("FILE", rows))
    code, text = evaluate("--include_path", folder, "--tasks", "sums", *words)
    assert code == 2 and message in text, text
    assert len(text.strip().splitlines()) == 1 and "Traceback" not in text, text


def test_texts_without_a_prompt_have_no_context(evaluate, folder, context):
    rolling = "task: texts\ndataset_path: json\ndataset_kwargs: {data_files: {test: FILE}}\ntest_split: test\n"
    rolling += 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: question\nmetric_list:\n'
    rolling += "  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}\n"
    (folder / "texts.yaml").write_text(rolling.replace("FILE", str(folder / "rows.jsonl")))
    words = ("--include_path", folder, "--tasks", "texts")
    code, text = evaluate(*words)
    assert code == 0 and "word_perplexity" in text, text
    code, text = evaluate(*words, "--context", context)
    assert code == 2 and "context has no effect on texts, which scores texts without a prompt" in text


def test_a_prompt_with_its_choice_must_fit(evaluate, folder):
    write_rows(folder / "rows.jsonl", [FACTS[0] | {"question": "word " * 520}])
    code, text = evaluate("--include_path", folder, "--tasks", "sums_choice")
    assert code == 2 and "takes 512 tokens, but the longest prompt of sums_choice, with the text that is scored" in text


@pytest.mark.timeout(120)
def test_without_a_network_a_data_set_that_is_missing_is_one_message_at_once(tiny):
    """In a process of its own, which may try the hub: the tests' own environment keeps it from that."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "https://nowhere.invalid"}
    words = [sys.executable, "-m", "opcd", "evaluate", tiny, "--tasks", "gsm8k"]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "tasks: gsm8k reads the data set openai/gsm8k/main, which is not here" in line
    assert "OfflineModeIsEnabled" in line  # nothing was tried, which takes 23 s and has another error


def test_the_model_is_named_once(opcd, tiny):
    code, text = opcd("evaluate", tiny, "--tasks", "contains", f"--model={tiny}")
    assert code == 2 and f"the model is named twice: {tiny} and by --model; remove one" in text


def test_did_you_mean_over_lm_evals_names(evaluate):
    for wrong, meant in (("gsm8kk", "gsm8k"), ("hellaswagg", "hellaswag"), ("containz", "contains")):
        code, text = evaluate("--tasks", wrong)
        assert code == 2 and f"no task '{wrong}'; did you mean {meant}?" in text


def gsm8k_in(cache: Path, tmp_path: Path) -> None:
    """Rows of our own where `datasets` keeps openai/gsm8k once it was read."""
    import datasets

    rows = [{"question": f"{n} and {n}?", "answer": f"They are {2 * n}.\n#### {2 * n}"} for n in range(8)]
    files = {split: str(write_rows(tmp_path / f"{split}.jsonl", rows)) for split in ("train", "test")}
    built = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "built"))
    (made,) = {Path(file["filename"]).parent for file in built["test"].cache_files}
    target = cache / "openai___gsm8k" / "main" / "0.0.0" / ("a" * 40)
    shutil.copytree(made, target)
    for file in target.glob("json-*.arrow"):
        file.rename(file.with_name(file.name.replace("json-", "gsm8k-")))
    about = json.loads((target / "dataset_info.json").read_text())
    about |= {"builder_name": "gsm8k", "dataset_name": "gsm8k", "config_name": "main"}
    (target / "dataset_info.json").write_text(json.dumps(about))


def test_lm_evals_gsm8k_from_the_local_cache(evaluate, tiny, cache, tmp_path):
    """Five examples before the question, two filters, lm-eval's names."""
    gsm8k_in(cache, tmp_path)
    words = ("--tasks", "gsm8k", "--max_new_tokens", 8, "--batch_size", 3, "--apply_chat_template", "false")
    code, text = evaluate(*words, "--out", tmp_path / "out")
    assert code == 0, text
    where = TaskManager(include_defaults=False, include_path=gsm8k_folder())
    theirs = lm_evals(tiny, "gsm8k", where, gen_kwargs="max_gen_toks=8")
    metrics, rows = results(tmp_path / "out", "gsm8k")
    names = ["exact_match,strict-match", "exact_match,flexible-extract"]
    assert list(metrics) == [*names, "cut_off", "response_tokens"]
    for name in names:
        assert metrics[name]["value"] == theirs["results"]["gsm8k"][name]
        assert (metrics[name]["low"], metrics[name]["high"]) == pytest.approx(wilson(8 * metrics[name]["value"], 8))
    samples = {sample["doc_id"]: sample["resps"][0][0] for sample in theirs["samples"]["gsm8k"]}
    assert [row["response"] for row in rows] == [samples[number] for number in range(8)]
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["tasks"]["gsm8k"]
    assert settings["num_fewshot"] == 5 and settings["data"] == "openai/gsm8k/main:test"
    assert settings["file"] == "lm_eval/tasks/gsm8k/gsm8k.yaml"


def gsm8k_folder() -> str:
    import lm_eval.tasks

    return str(Path(lm_eval.tasks.__file__).parent / "gsm8k")


@pytest.mark.slow
def test_a_tag_of_the_users_gives_its_tasks(evaluate, folder, tmp_path):
    """All files of lm-eval are read first, which takes 20 s."""
    for name in ("sums", "sums_choice"):
        file = folder / f"{name}.yaml"
        file.write_text("tag: all_sums\n" + file.read_text())
    words = ("--include_path", folder, "--max_new_tokens", 2)
    assert evaluate("--tasks", "all_sums", *words, "--out", tmp_path / "out")[0] == 0
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(summary["tasks"]) == ["sums", "sums_choice"]
    code, text = evaluate("--tasks", "all_sums,sums", *words)
    assert code == 2 and "sums is asked twice" in text


def test_contains_and_exact_are_scored_by_their_rules(evaluate, tiny, tmp_path):
    """References are made of the answers: a word of each, another word, all of it."""
    asked = [{"query": f"Name {n} rivers.", "reference": "x"} for n in range(4)]
    words = ("--tasks", "contains,exact", "--max_new_tokens", 6)
    file = write_rows(tmp_path / "val.jsonl", asked)
    data = ("--data.contains", file, "--data.exact", file)
    assert evaluate(*words, *data, "--out", tmp_path / "first")[0] == 0
    answers = [row["response"] for row in results(tmp_path / "first", "contains")[1]]
    references = [answers[0].split()[0], f"  {answers[1]} ", answers[2].swapcase(), "nothing of the kind"]
    write_rows(file, [row | {"reference": reference} for row, reference in zip(asked, references, strict=True)])
    assert evaluate(*words, *data, "--out", tmp_path / "second")[0] == 0
    metrics, rows = results(tmp_path / "second", "contains")
    assert [row["response"] for row in rows] == answers
    assert [row["accuracy"] for row in rows] == [holds(*pair) for pair in zip(answers, references, strict=True)]
    assert rows[0]["accuracy"] and rows[2]["accuracy"] and not rows[3]["accuracy"]
    assert metrics["accuracy"]["low"] < metrics["accuracy"]["value"] < metrics["accuracy"]["high"]
    assert [row["accuracy"] for row in results(tmp_path / "second", "exact")[1]] == [False, True, False, False]


def test_choice_takes_the_likeliest_answer_in_the_chat(evaluate, tiny, tmp_path):
    rows = [{"query": "Which?", "choices": ["a river", "two", "the sea"], "reference": "two"}]
    rows += [{"query": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]}]
    rows[1] |= {"choices": ["3", "4"], "reference": 4}
    file = write_rows(tmp_path / "val.jsonl", rows)
    code, text = evaluate("--tasks", "choice", "--data.choice", file, "--out", tmp_path / "out")
    assert code == 0, text
    metrics, found = results(tmp_path / "out", "choice")
    assert list(metrics) == ["acc", "acc_norm"] and [row["reference"] for row in found] == ["two", "4"]
    for row in found:
        likeliest = row["choices"][row["log_likelihoods"].index(max(row["log_likelihoods"]))]
        assert row["response"] == likeliest and row["acc"] is (likeliest == row["reference"])
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["tasks"]["choice"]
    assert settings["apply_chat_template"] and settings["data"] == str(file)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "choices": "ab", "reference": "a"}, "choices must be a list of texts"),
        ({"query": "q", "choices": ["a"], "reference": "a"}, "two or more, each once"),
        ({"query": "q", "choices": ["a", "a "], "reference": "a"}, "two or more, each once"),
        ({"query": "q", "choices": ["a", "b"], "reference": "c"}, "the reference 'c' is none of the choices"),
        ({"query": "q", "choices": ["a", "b"]}, "no answer to compare with"),
    ],
)
def test_a_wrong_row_of_choice_is_named(row, message, tiny, tmp_path):
    good = {"query": "q", "choices": ["a", "b"], "reference": "a"}
    file = write_rows(tmp_path / "val.jsonl", [good, row])
    with pytest.raises(UserError, match=message) as error:
        Evaluator(Evaluation("choice", {"choice": str(file)}), ModelConfig(tiny))
    assert f"{file}:2: " in str(error.value)


def test_tasks_for_rows_of_ones_own_want_rows(evaluate):
    for task in ("contains", "exact", "choice"):
        code, text = evaluate("--tasks", task)
        assert code == 2 and f"data.{task} is not set: name a file or a hub data set with your rows" in text, text


def test_the_example_folder(evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ("--include_path", "examples/evaluation_tasks", "--tasks", "harbour,harbour_choice")
    code, text = evaluate(*words, "--out", tmp_path / "out")
    assert code == 0, text
    assert list(results(tmp_path / "out", "harbour")[0])[:2] == ["exact_match", "first_letter"]
    assert [row["reference"] for row in results(tmp_path / "out", "harbour_choice")[1]][:2] == ["bollard", "pilot"]


def test_the_task_files_of_the_page(evaluate, tmp_path, monkeypatch):
    """Those of docs/evaluation.md, with rows of ours."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^```yaml\n# (my_tasks/\w+\.yaml)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    assert list(blocks) == ["my_tasks/capitals.yaml", "my_tasks/gsm8k_here.yaml"]
    (tmp_path / "my_tasks").mkdir()
    for file, text in blocks.items():
        Path(file).write_text(text.replace("/path/to/lm_eval/tasks/gsm8k", gsm8k_folder()))
    write_rows(Path("my_tasks/capitals.jsonl"), [{"country": "Peru", "capital": "Lima"}])
    for split in ("train", "test"):
        sums = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(6)]
        write_rows(Path(f"my_tasks/gsm8k_{split}.jsonl"), sums)
    words = ("--include_path", "my_tasks", "--tasks", "capitals,gsm8k_here", "--max_new_tokens", 4)
    code, text = evaluate(*words, "--out", "out")
    assert code == 0, text
    assert "exact_match,strict-match" in results(Path("out"), "gsm8k_here")[0]
    assert results(Path("out"), "capitals")[1][0]["reference"] == "Lima"
