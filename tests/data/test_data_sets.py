"""Several data sets as one source, and the teachers that rows name."""

import pytest

from opcd.data import ContextQueryDataModule, DataSet, DataSets, TeacherModels, Views
from opcd.models import ModelConfig
from opcd.runtime.errors import UserError

OWN = "{% for m in messages %}<|im_start|>{{ m.role }}\nSeen: {{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATE = OWN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture
def sets(write_rows, tmp_path):
    """Two files; the second has a context and a teacher of its own, but for one row."""
    (tmp_path / "lessons.txt").write_text("Think first.\n")
    (tmp_path / "shared.txt").write_text("Be kind.\n")
    own = {"query": "b", "context": "Be brief.", "teacher": "maths"}
    first = DataSet(write_rows({"query": "a"}, own, name="a.jsonl"))
    second = DataSet(
        write_rows({"query": "c"}, own, name="b.jsonl"), context=str(tmp_path / "lessons.txt"), teacher="style"
    )
    return [first, second]


def test_rows_keep_what_they_name_and_get_the_rest_of_their_data_set(sets):
    examples = DataSets(sets).examples("data.train")
    assert [e.index for e in examples] == [0, 1, 2, 3]
    assert [e.context for e in examples] == [None, "Be brief.", "Think first.", "Be brief."]
    assert [e.teacher for e in examples] == [None, "maths", "style", "maths"]
    assert [e.source.rpartition("/")[2] for e in examples] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]


def test_each_teacher_sees_its_rows_through_its_own_chat_template(sets, tmp_path, tokenizer):
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    models = {"maths": None, "style": ModelConfig(chat_template=str(tmp_path / "own.jinja"))}
    teacher = TeacherModels(models, default="maths")
    data = ContextQueryDataModule(train=DataSets(sets), context=str(tmp_path / "shared.txt"), teacher=teacher)
    data.setup("fit")
    examples = data.examples("train")
    assert [e.teacher for e in examples] == ["maths", "maths", "style", "maths"]
    batch = data.encode(examples)
    plain = Views(tokenizer, tokenizer)
    assert batch.teacher_prompts[0].tolist() == plain.teacher_prompt(examples[0], "Be kind.")
    assert batch.teacher_prompts[3].tolist() == plain.teacher_prompt(examples[3], "Be brief.")
    assert [p.tolist() for p in batch.student_prompts] == [plain.student_prompt(e) for e in examples]
    seen = tokenizer.decode(batch.teacher_prompts[2])
    assert seen == (
        "<|im_start|>system\nSeen: Think first.<|im_end|>\n<|im_start|>user\nSeen: c<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(batch.teacher_prefixes[2]).startswith("<|im_start|>system\nSeen: Think first.")
    longest = {name: data.longest_teacher_prompt("train", name) for name in models}
    assert longest == {
        "maths": max(len(batch.teacher_prompts[i]) for i in (0, 1, 3)),
        "style": len(batch.teacher_prompts[2]),
    }
    again = batch.select([2, 0]).asking([examples[2], examples[0]])  # a game's next turn
    assert [p.tolist() for p in again.teacher_prompts] == [batch.teacher_prompts[i].tolist() for i in (2, 0)]


def test_rows_to_predict_need_no_teacher(sets):
    data = ContextQueryDataModule(predict=DataSets(sets))
    data.setup("predict")
    assert len(data.encode(data.examples("predict"))) == 4


@pytest.mark.parametrize(
    ("row", "teacher", "message"),
    [
        (
            {"teacher": "maths"},
            None,
            r"rows\.jsonl:2: teacher 'maths' has no effect, because model.teacher is a single",
        ),
        ({"teacher": "math"}, TeacherModels({"maths": None}), r"rows\.jsonl:2: no teacher 'math' .*you mean maths\?"),
        ({"teacher": "x"}, TeacherModels({"maths": None}), r"rows\.jsonl:2: no teacher 'x' .*there are maths$"),
        ({}, TeacherModels({"maths": None}), r"rows\.jsonl:2: no teacher: name one of maths .*init_args\.default"),
        ({"teacher": 3}, TeacherModels({"maths": None}), r"rows\.jsonl:2: teacher must be text"),
        ({"teachers": "maths"}, TeacherModels({"maths": None}), r"unknown key 'teachers'; did you mean teacher\?"),
    ],
)
def test_rows_with_a_wrong_teacher(write_rows, row, teacher, message):
    first = {"query": "a", "context": "c"}
    if teacher is not None:
        first["teacher"] = "maths"
    train = write_rows(first, {"query": "b", "context": "c"} | row)
    with pytest.raises(UserError, match=message):
        ContextQueryDataModule(train=train, teacher=teacher).setup("fit")


def test_what_has_no_effect_or_is_not_one_context(write_rows, tmp_path):
    rows = write_rows({"query": "a", "context": "c", "teacher": "t"})
    with pytest.raises(UserError, match=r"^data\.train\.init_args\.data_sets\[0\]\.teacher has no effect: every row"):
        DataSets([DataSet(rows, teacher="t")]).examples("data.train")
    (tmp_path / "two.json").write_text('["a", "b"]')
    with pytest.raises(UserError, match=r"data_sets\[0\]\.context: .*two\.json holds 2 contexts"):
        DataSets([DataSet(write_rows({"query": "a"}), context=str(tmp_path / "two.json"))]).examples("data.train")
    with pytest.raises(ValueError, match="at least one data set"):
        DataSets([])
