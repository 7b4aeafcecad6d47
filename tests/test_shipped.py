"""What the repository says of the paper; its recipes lack the hub and GPUs, and nothing else."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import opcd.data.readers
from opcd.data import parse_row, read_examples
from opcd.runtime.errors import UserError
from tests.helpers.paths import ROOT

RECIPES = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "benchmarks" / "configs").glob("*.yaml")])


def tracked() -> list[Path]:
    """Files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def values(config: object, key: str = "") -> list[tuple[str, str]]:
    """(dotted key, text) of all texts of a config."""
    if isinstance(config, dict):
        return [pair for name, inside in config.items() for pair in values(inside, f"{key}.{name}".lstrip("."))]
    if isinstance(config, list):
        return [pair for inside in config for pair in values(inside, key)]
    return [(key, config)] if isinstance(config, str) else []


def test_no_page_gives_the_summarys_figures_as_the_papers():
    claim = re.compile(r"10 (to|and) 15|\+ ?10 ?[-\u2013] ?15|10[-\u2013]15 points")
    found = [
        file.relative_to(ROOT).as_posix()
        for file in tracked()
        if file.suffix in (".md", ".py", ".yaml", ".j2", ".cff", ".toml") and file != Path(__file__)
        if claim.search(file.read_text(encoding="utf-8"))
    ]
    assert set(found) <= {"CHANGELOG.md", "benchmarks/results/cross_size/README.md"}
    page = (ROOT / "benchmarks/results/cross_size/README.md").read_text(encoding="utf-8")
    explained = next(part for part in page.split("\n\n") if "10 to 15 points over" in part)
    assert "stand in none of its tables" in explained
    assert (
        "chosen on the test set" in page and "chose its checkpoints on the test set" in (ROOT / "README.md").read_text()
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_file_that_a_recipe_names_is_here(recipe):
    config = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    named = [
        (key, text)
        for key, text in values(config)
        if re.search(r"(^|\.)(train|val|test|predict|context|data|ifeval|config)$", key) or "/data/" in text
    ]
    hub = opcd.data.readers.HUB_ID

    def is_here(text: str) -> bool:
        return (ROOT / text).is_file() or (recipe.parent / text).is_file()

    assert [(key, text) for key, text in named if not is_here(text) and not hub.fullmatch(text)] == []
    local = [(key, text) for key, text in named if text.endswith((".txt", ".jsonl", ".json", ".yaml"))]
    assert [(key, text) for key, text in local if not is_here(text)] == []


def test_the_lessons_of_the_recipe_are_those_that_the_run_selected():
    lessons = (ROOT / "configs/data/math_lessons.txt").read_bytes()
    assert lessons == (ROOT / "benchmarks/results/experience/framed/context.txt").read_bytes()
    said = (ROOT / "configs/data/README.md").read_text(encoding="utf-8")
    assert "Qwen2.5-Coder-1.5B-Instruct" in said and "benchmarks/results/experience/framed" in said
    told = [file.name for file in (ROOT / "configs/data").iterdir() if file.name != "README.md"]
    families = {re.sub(r"_(train|val|rules)\.jsonl$", "_*.jsonl", name) for name in told}
    assert [name for name in families if f"`{name}`" not in said] == []


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of folders: `org/name` is a data set with the configs all, en and cn, as open-r1's is."""
    import datasets

    rows = 'prompt,solution,source\n"Find 1 + 1.",2,{0}\n"Find 2 + 2.",4,{0}\n'
    folder = tmp_path / "set"
    folder.mkdir(parents=True)
    configs = []
    for config in ("all", "en", "cn"):
        (folder / f"{config}.csv").write_text(rows.format(config))
        configs.append({"config_name": config, "data_files": [{"split": "train", "path": f"{config}.csv"}]})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    asked = []

    def load(name, config=None, *, split):
        asked.append((name, config, split))
        return datasets_load(str(folder), config, split=split, cache_dir=str(tmp_path / "cache"))

    datasets_load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # set by a reader that finds no hub; put back here
    monkeypatch.setattr(opcd.data.readers, "hub_reachable", lambda: True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return asked


def test_a_data_set_of_the_hub_names_its_config(hub):
    examples = read_examples("org/name/en:train")
    assert [example.query for example in examples] == ["Find 1 + 1.", "Find 2 + 2."]
    assert examples[0].source == "org/name/en:train: row 1" and hub == [("org/name", "en", "train")]
    assert len(read_examples("org/name/cn:train[:1]")) == 1
    assert len(read_examples("org/name/all")) == 2  # the split is train where none is said


def test_a_set_with_several_configs_says_which_there_are(hub):
    for source in ("org/name:train", "org/name/de:train"):
        with pytest.raises(UserError, match=r"data\.train: the hub data set org/name\S* cannot be read") as refused:
            read_examples(source)
        assert all(name in str(refused.value) for name in ("all", "en", "cn", "org/name/CONFIG:train"))


def test_the_papers_medical_rows_are_read_as_they_are():
    row = {"content": [{"role": "user", "content": "Which?"}], "answer": "B"}
    example = parse_row(row, "x: row 1", 0)
    assert (example.query, example.reference) == (row["content"], "B")


def test_cross_size_as_it_stands_lacks_only_the_hub_and_gpus(opcd, hub, tiny, monkeypatch, tmp_path):
    """With models and a data set of its names standing in, the shipped recipe takes a step."""
    monkeypatch.chdir(ROOT)
    shorter = ("--model.rollout.init_args.sampling.max_new_tokens", 4, "--model.eval_sampling.max_new_tokens", 2)
    code, said = opcd(
        *("fit", "--config", "configs/cross_size.yaml", "--model.student.name", tiny, *shorter),
        *("--model.teacher.init_args.model.name", tiny, "--data.batch_size", 2, "--trainer.max_steps", 1),
        *("--model.student.chat_template_kwargs", "{}", "--model.teacher.init_args.model.chat_template_kwargs", "{}"),
        *("--trainer.default_root_dir", tmp_path / "runs"),
    )
    assert code == 0, said
    assert hub == [("open-r1/DAPO-Math-17k-Processed", "en", "train")]


@pytest.mark.parametrize(
    ("recipes", "words"),
    [
        (["quickstart"], ()),
        (["off_policy"], ()),
        (["system_prompt"], ("--model.rollout.init_args.sampling.max_new_tokens", 4)),
        (["quickstart", "lora"], ()),
        (["quickstart", "qlora"], ()),
        (["quickstart", "cartridge"], ()),
        (["quickstart", "teacher_4bit"], ()),
        (
            ["cross_size_cpu"],
            (
                *(
                    "--model.teacher.init_args.model.name",
                    "tiny",
                    "--data.train",
                    "configs/data/quickstart_train.jsonl",
                ),
                *("--data.context", "configs/data/quickstart_context.txt"),
            ),
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_every_recipe_takes_a_step_with_a_tiny_model(opcd, recipes, words, tiny, monkeypatch, tmp_path):
    """cross_size has a test of its own; node_8gpu, fsdp2 and slurm want more than one machine has here."""
    monkeypatch.chdir(ROOT)
    files = [word for recipe in recipes for word in ("--config", f"configs/{recipe}.yaml")]
    said = [tiny if word == "tiny" else word for word in words]
    code, text = opcd(
        *("fit", *files, "--model.student.name", tiny, *said, "--model.eval_sampling.max_new_tokens", 2),
        *("--data.batch_size", 2, "--trainer.max_steps", 1, "--trainer.default_root_dir", tmp_path / "runs"),
    )
    assert code == 0, text
    assert (tmp_path / "runs/version_0/student").is_dir()
    assert len((tmp_path / "runs/version_0/metrics.csv").read_text().splitlines()) > 1
