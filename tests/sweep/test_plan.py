"""A sweep's file: its arms, their names, and what is refused before anything is parsed."""

import pytest
import yaml

from opcd.runtime.errors import UserError
from opcd.sweep.sweep_plan import file_name, grid, label, make_arm, overrides, read_sweep, short_names

TOP_K = {"class_path": "opcd.losses.TopK", "init_args": {"k": 256, "tail": "drop"}}


@pytest.fixture
def sweep(tmp_path):
    def write(content: object) -> object:
        file = tmp_path / "sweep.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return read_sweep(file)

    return write


def test_arms_are_crossed_with_the_product_of_the_axes(sweep):
    arms = grid(
        sweep(
            {
                "arms": {"off-policy": {"model.rollout": "TeacherRollout"}, "on": {"model.rollout": "StudentRollout"}},
                "axes": {"model.loss": ["JSD", TOP_K], "seed_everything": [0, 1]},
            }
        )
    )
    assert [arm.name for arm in arms[:4]] == [
        "off-policy,loss=JSD,seed_everything=0",
        "off-policy,loss=JSD,seed_everything=1",
        "off-policy,loss=TopK-k=256-tail=drop,seed_everything=0",
        "off-policy,loss=TopK-k=256-tail=drop,seed_everything=1",
    ]
    assert len(arms) == 8
    assert arms[3].settings == {"model.rollout": "TeacherRollout", "model.loss": TOP_K, "seed_everything": 1}


def test_names_of_keys_and_values():
    keys = ["model.student.name", "model.teacher.init_args.model.name", "model.optimizer.init_args.lr"]
    assert list(short_names(keys).values()) == ["student.name", "model.name", "lr"]
    assert [label(value) for value in ("opcd.losses.JSD", 1e-5, None, "a/b c.jsonl", [1, 2])] == [
        *("JSD", "1e-05", "null", "a_b_c.jsonl", "[1-2]".replace("[", "").replace("]", "")),
    ]
    assert [file_name(text) for text in ("..", ".hidden", "a/../b", "")] == ["_", "_hidden", "a_.._b", "_"]
    long = make_arm({"data.train": "x" * 300})
    assert len(long.name) == 120 and long.name != make_arm({"data.train": "x" * 301}).name


def test_words_of_the_command_line():
    settings = {"model.loss": "JSD", "model.temperature": 0.5, "data.val": None, "model.loss.init_args": {"a": 1}}
    pairs = zip(settings, ["JSD", "0.5", "null", '{"a": 1}'], strict=True)
    assert overrides(settings) == [word for key, value in pairs for word in (f"--{key}", value)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {}}, "nothing to sweep"),
        ({"bxes": {"a": [1]}}, "no such key 'bxes'; did you mean axes?"),
        ("axes: [1, 2]", "axes"),
        ("- a", "must hold a mapping"),
        ("axes: {a: [1]", "not valid YAML"),
        ("axes:\n  a: [1]\n  a: [2]\n", "'a' is there twice, again in line 3"),
        ("arms:\n  one: {x: 1}\n  one: {x: 2}\n", "'one' is there twice, again in line 3"),
        ({"arms": {"x": 1}}, "arms must be a mapping"),
        ({"axes": {1: [1]}}, "axes must be a mapping with texts"),
        ({"axes": {"a": [1]}, "search": {"metric": "m"}}, "search: opcd no longer searches with Optuna; list"),
        (
            {"axes": {"a": [1]}, "slurm": {"timeout_min": 5}},
            "slurm: opcd runs srun, not submitit; list",
        ),
        ({"axes": {"a": [1]}, "slurm": "--gpus=1"}, "slurm"),
    ],
)
def test_a_wrong_file_is_refused(sweep, content, message):
    with pytest.raises(UserError, match=message.replace("'", ".").replace("?", ".")):
        sweep(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {"a.b": []}}, "axes.a.b must be a list of values"),
        ({"axes": {"a.b": {"low": 1, "high": 2}}}, "axes.a.b must be a list of values, not"),
        ({"axes": {"a.b": [1, 1]}}, "two arms are called b=1: the same value is there twice"),
        ({"axes": {"a.b": ["x/y", "x_y"]}}, "two arms are called b=x_y"),
        ({"arms": {"x/y": {"a": 1}, "x_y": {"a": 2}}}, "two arms are called x_y"),
        ({"arms": {"x": {"a": 1}}, "axes": {"a": [1, 2]}}, "arms.x sets a, which is an axis"),
    ],
)
def test_wrong_arms_are_refused(sweep, content, message):
    with pytest.raises(UserError, match=message):
        grid(sweep(content))


def test_a_missing_file(tmp_path):
    (tmp_path / "sweep.yaml").touch()
    with pytest.raises(UserError, match=r"no file .*swep.yaml; did you mean sweep.yaml"):
        read_sweep(tmp_path / "swep.yaml")
