"""The data module: stages, budgets, loaders, draws, and a real Trainer over it."""

import json
import logging
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer

from opcd.data import ContextQueryDataModule, context_hash, read_examples
from opcd.models import ModelConfig
from opcd.runtime.errors import UserError

QUERIES = [{"query": f"What is {n} + {n}?", "reference": 2 * n} for n in range(10)]


@pytest.fixture
def files(tmp_path, write_rows, monkeypatch, tiny):
    """Sources and the tiny model by relative names in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny)
    write_rows(*QUERIES, name="train.jsonl")
    write_rows(*QUERIES[:3], name="val.jsonl")
    write_rows({"query": "q", "context": "own"}, name="own.jsonl")
    (tmp_path / "context.txt").write_text("Answer in French.\n")
    (tmp_path / "contexts.json").write_text(json.dumps(["Be kind.", "Answer in French.", "Write in capitals."]))
    return tmp_path


def module(stage="fit", **arguments):
    student = ModelConfig(name="./tiny")
    data = ContextQueryDataModule(**{"train": "train.jsonl", "context": "context.txt", "student": student} | arguments)
    data.setup(stage)
    return data


def refusal(stage="fit", **arguments):
    with pytest.raises(UserError) as raised:
        module(stage, **arguments)
    return str(raised.value)


def test_setup_reads_what_the_stage_needs(files):
    data = module(val="val.jsonl", test="absent.jsonl")
    assert (len(data.examples("train")), len(data.examples("val"))) == (10, 3)
    assert data.examples("train")[4].reference == "8"
    rows = data.examples("train")
    data.setup("validate")
    data.setup("fit")
    assert data.examples("train") is rows
    with pytest.raises(RuntimeError, match="'test' is not set up"):
        data.examples("test")


@pytest.mark.parametrize(
    ("stage", "split"), [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")]
)
def test_a_missing_source_is_named(files, stage, split):
    expected = f"data.{split} is not set; `{stage}` needs it: name a file or a hub data set (`opcd queries"
    assert refusal(stage, train=None).startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val": "vla.jsonl"}, "data.val: no file "),
        ({"context": None}, "train.jsonl:1: no context: give the row one, or set data.context"),
        ({"train": "own.jsonl"}, "data.context has no effect: every row has a context of its own"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, not 0"),
        ({"eval_batch_size": 0}, "data.eval_batch_size must be at least 1, not 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, not -1"),
        ({"template": "{context}{query}"}, "data.template has no effect with data.placement: system"),
        ({"overlong_context": "drop"}, "data.overlong_context: drop has no effect without data.max_context_tokens"),
        ({"overlong_query": "drop"}, "data.overlong_query: drop has no effect without data.max_query_tokens"),
        ({"max_query_tokens": 0}, "data.max_query_tokens must be at least 1, not 0"),
    ],
)
def test_wrong_arguments(files, arguments, message):
    assert refusal(**arguments).startswith(message)


def test_own_contexts_beside_another_split(files):
    """data.context serves the training rows, though validation alone does not use it."""
    data = module("validate", val="own.jsonl")
    assert data.encode(data.examples("val")).contexts == ["own"]


def test_encode(files, packaged_tokenizer):
    data = module()
    rows = read_examples("train.jsonl")[:2]
    batch = data.encode(rows)
    tokenizer = packaged_tokenizer
    assert batch.examples == rows
    assert batch.contexts == ["Answer in French."] * 2
    assert "system\nAnswer in French.<|im_end|>" in tokenizer.decode(batch.teacher_prompts[0])
    assert batch.student_prompts[1].tolist() == data.views.student_prompt(rows[1])
    assert (batch.student_prompts[0].dtype, batch.student_prompts[0].ndim) == (torch.int64, 1)
    assert batch.responses == [None, None]


def test_recorded_responses(files, write_rows, packaged_tokenizer):
    write_rows({"query": "q", "response": "Yes."}, name="recorded.jsonl")
    data = module(train="recorded.jsonl")
    (response,) = data.encode(data.examples("train")).responses
    assert packaged_tokenizer.decode(response) == "Yes.<|im_end|>"


def test_dapo_shape(files, write_rows):
    """The shape of gsm8k.jsonl and of DAPO-Math-17k on the hub."""
    prompt = [{"role": "user", "content": "Solve the following math problem step by step.\n\nWhat is 2 + 2?"}]
    row = {"data_source": "math_dapo", "prompt": prompt, "ability": "MATH", "extra_info": {"index": "gsm8k-test-1"}}
    write_rows(*[row | {"reward_model": {"ground_truth": "4", "style": "rule"}}] * 3, name="math.jsonl")
    data = module(train="math.jsonl")
    assert [(e.query, e.reference) for e in data.examples("train")] == [(prompt, "4")]


def batches(data, loader):
    return [[row.example.index for row in rows] for rows in loader]


def test_workers_encode_what_the_main_process_would(files):
    """With the contexts of the epoch, drawn from a list: a row is tokenized where it is collated."""

    def epochs(workers):
        data = module(batch_size=4, num_workers=workers, context="contexts.json")
        loader = data.train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found.append([(row.context, row.teacher_prompt.tolist()) for rows in loader for row in rows])
        return found

    first, second = epochs(0)
    assert {context for context, _ in first} != {None} and first != second
    assert epochs(2) == [first, second]


def test_order(files):
    def orders(workers=0, **arguments):
        data = module(batch_size=4, num_workers=workers, **arguments)
        loader = data.train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)  # as Lightning does
            found.append(batches(data, loader))
        return found

    first, second = orders()
    assert [len(rows) for rows in first] == [4, 4, 2]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    assert first != second
    assert orders(workers=2) == [first, second]
    assert orders(seed=1) != [first, second]
    assert orders(shuffle=False)[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_eval_loaders_keep_the_order(files):
    data = module("validate", val="val.jsonl", eval_batch_size=2)
    assert batches(data, data.val_dataloader()) == [[0, 1], [2]]
    assert batches(data, module("predict", predict="val.jsonl").predict_dataloader()) == [[0, 1, 2]]
    assert batches(data, module("test", test="val.jsonl", batch_size=1).test_dataloader()) == [[0], [1], [2]]


def test_the_queries_of_a_step_are_divided_among_the_ranks(files):
    data = module(batch_size=8)
    seen = []
    for rank in range(2):
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank}, world_size=2)
        rows = batches(data, data.train_dataloader())
        assert [len(batch) for batch in rows] == [4, 1]
        seen += chain(*rows)
    assert sorted(seen) == list(range(10))
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 3, "rank": 0}, world_size=3)
    with pytest.raises(UserError, match=r"data\.batch_size: 8 queries a step cannot be divided among 3 ranks .* 9$"):
        data.train_dataloader()


class Recorder(LightningModule):
    """Learns one number, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen += [(self.current_epoch, e.index, c) for e, c in zip(batch.examples, batch.contexts, strict=True)]
        return self.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        self.seen += [("val", e.index, c) for e, c in zip(batch.examples, batch.contexts, strict=True)]

    def predict_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)
        return len(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def third_party_warnings(test):
    """Lightning's advice on workers, logging and validation, and its use of what torch deprecates."""
    for message in (
        ".*does not have many workers",
        "The number of training batches",
        "You defined a `validation_step`",
        ".*LeafSpec",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


def trainer(epochs=2):
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@third_party_warnings
def test_a_trainer_draws_contexts_by_epoch(files):
    data = ContextQueryDataModule(train="train.jsonl", val="val.jsonl", context="contexts.json", batch_size=4, seed=3)
    recorder = Recorder()
    trainer().fit(recorder, data)
    rows = data.examples("train")
    trained = [entry for entry in recorder.seen if entry[0] != "val"]
    for epoch in range(2):
        drawn = data.encode(rows, epoch).contexts
        assert sorted(e for e in trained if e[0] == epoch) == [(epoch, i, drawn[i]) for i in range(10)]
    assert [i for e, i, _ in trained if e == 0] != [i for e, i, _ in trained if e == 1]
    validated = [entry for entry in recorder.seen if entry[0] == "val"]
    drawn = data.encode(data.examples("val")).contexts
    assert validated[:3] == validated[-3:] == [("val", i, drawn[i]) for i in range(3)]
    # Another instance with workers: the same.
    again = Recorder()
    trainer().fit(again, module(val="val.jsonl", context="contexts.json", batch_size=4, seed=3, num_workers=2))
    assert again.seen == recorder.seen


@third_party_warnings
def test_a_trainer_without_validation_and_predict(files):
    recorder = Recorder()
    data = ContextQueryDataModule(train="train.jsonl", predict="val.jsonl", context="context.txt", batch_size=5)
    trainer(epochs=1).fit(recorder, data)
    assert len(recorder.seen) == 10
    assert trainer().predict(recorder, data) == [3]
    assert recorder.seen[10:] == [("val", i, "Answer in French.") for i in range(3)]


def test_longest_prompts_are_exact(files, write_rows):
    words = "many short words in a row that make a long query, "
    system = {"role": "system", "content": words * 9}
    rows = [
        *({"query": words * n} for n in (1, 12, 5)),
        {"query": [system, {"role": "user", "content": "q"}]},
        {"query": "q", "context": words * 6},
    ]
    write_rows(*rows, name="long.jsonl")
    for contexts in (["c"], ["c", (words * 20).strip(), words.strip()]):
        (files / "list.json").write_text(json.dumps(contexts))
        data = module(train="long.jsonl", context="list.json")
        views, examples = data.views, data.examples("train")
        teacher = max(
            len(views.teacher_prompt(e, c)) for e in examples for c in ([e.context] if e.context else contexts)
        )
        assert data.longest_student_prompt("train") == max(len(views.student_prompt(e)) for e in examples)
        assert data.longest_teacher_prompt("train") == teacher


def test_context_hash(files):
    assert module().context_hash == context_hash(["Answer in French."])
    assert module(context=None, train="own.jsonl").context_hash == context_hash(["own"])


def test_the_teacher_is_the_student_by_default(files, tmp_path):
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}")
    assert "same generation prompt" in refusal(teacher=ModelConfig(chat_template=str(template)))
    data = module(student=ModelConfig(chat_template=str(template)), placement="user")
    (prompt, *_) = data.encode(data.examples("train")).teacher_prompts
    assert data.views.context_text(prompt.tolist()) == "Answer in French.\n\nWhat is 0 + 0?>"


LONG = "one two three four five six seven eight nine ten"


@pytest.fixture
def long_files(files, write_rows):
    write_rows({"query": "a", "context": LONG}, {"query": "b"}, {"query": "b " * 100}, name="long.jsonl")
    (files / "list.json").write_text(json.dumps([LONG, "short"]))
    (files / "long.txt").write_text(LONG)


def test_overlong_raises(long_files):
    message = refusal(train="long.jsonl", max_context_tokens=4)
    assert message.startswith("long.jsonl:1: the context has 10 tokens, data.max_context_tokens allows 4; raise it, or")
    assert refusal(context="list.json", max_context_tokens=9).startswith("data.context, context 1: the context has 10 ")
    message = refusal(train="long.jsonl", max_query_tokens=100)
    assert message.startswith("long.jsonl:3: the student's prompt has ")
    assert message.endswith("data.max_query_tokens allows 100; raise it, or set data.overlong_query")
    module(train="long.jsonl", max_context_tokens=10)


def test_overlong_drops_and_says_so(long_files, caplog):
    with caplog.at_level(logging.INFO):
        data = module(
            train="long.jsonl",
            context="list.json",
            max_context_tokens=9,
            overlong_context="drop",
            max_query_tokens=100,
            overlong_query="drop",
        )
    assert [(e.query, e.index) for e in data.examples("train")] == [("b", 1)]
    assert data.encode(data.examples("train")).contexts == ["short"]
    assert "data.context: dropped 1 with a context over 9 tokens; 1 remain" in caplog.text
    assert "data.train: dropped 1 with a context over 9 tokens; 1 remain" in caplog.text
    assert "data.train: dropped 1 with a student's prompt over 100 tokens; 1 remain" in caplog.text
    assert refusal(max_query_tokens=3, overlong_query="drop").startswith("data.train: nothing is left")
    assert refusal(max_context_tokens=1, overlong_context="drop").startswith("data.context: nothing is left")


@pytest.mark.parametrize(("policy", "text"), [("cut_left", " eight nine ten"), ("cut_right", "one two three")])
def test_overlong_cuts_and_says_so(long_files, caplog, policy, text):
    with caplog.at_level(logging.INFO):
        data = module(train="long.jsonl", context="long.txt", max_context_tokens=3, overlong_context=policy)
    assert data.examples("train")[0].context == text
    assert data.encode(data.examples("train")).contexts == [text] * 3
    assert f"data.context: cut 7 tokens in all ({policy}) from contexts over 3 tokens; 1 remain" in caplog.text
    assert f"data.train: cut 7 tokens in all ({policy}) from contexts over 3 tokens; 3 remain" in caplog.text


@pytest.mark.parametrize("policy", ["cut_left", "cut_right"])
def test_a_cut_keeps_characters_whole(files, policy):
    context = "🦜🦚🦩" * 5
    (files / "birds.txt").write_text(context)
    data = module(context="birds.txt", max_context_tokens=11, overlong_context=policy)
    (cut, *_) = data.encode(data.examples("train")).contexts
    assert cut in context
    assert 1 < len(cut) < len(context)
    assert 0 < len(data.views.context_ids(cut)) <= 11
    assert refusal(context="birds.txt", max_context_tokens=1, overlong_context=policy).startswith(
        "data.max_context_tokens: 1 leaves no text of a context"
    )


SWITCHES = (
    "{% set ns = namespace(think=true) %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% if '/no_think' in m.content %}{% set ns.think = false %}{% endif %}{% endfor %}<|im_start|>assistant\n"
    "{% if ns.think %}Hm.{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def with_template(folder, template, **arguments):
    (folder / "template.jinja").write_text(template)
    student = ModelConfig(chat_template=str(folder / "template.jinja"))
    return ContextQueryDataModule(student=student, **arguments)


@pytest.mark.case("D14")
def test_rows_that_the_template_refuses_are_skipped_and_counted(tmp_path, write_rows):
    system = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": "Hi"}]
    train = write_rows({"query": system, "context": "c"}, {"query": "Hi?", "context": "c"})
    module = with_template(tmp_path, NO_SYSTEM, train=train, placement="user", on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"data\.train: 1 bad rows skipped .*, 1 kept: .*:1: .*rejects.*no system"):
        module.setup("fit")
    assert [e.query for e in module.examples("train")] == ["Hi?"]
    with pytest.raises(UserError, match=r":1: the chat template rejects these messages: no system"):
        with_template(tmp_path, NO_SYSTEM, train=train, placement="user").setup("fit")
    bad = with_template(tmp_path, NO_SYSTEM, predict=write_rows({"query": system}), placement="user", on_bad_row="skip")
    with (
        pytest.raises(UserError, match=r"^data\.predict: no row is left; the first error: "),
        pytest.warns(UserWarning),
    ):
        bad.setup("predict")


@pytest.mark.case("D6")
def test_every_context_must_leave_the_end_as_it_is(tmp_path, write_rows):
    contexts = tmp_path / "contexts.json"
    contexts.write_text('["Be brief.", "Be brief. /no_think"]')
    train = write_rows({"query": "a"})
    with pytest.raises(UserError, match=r"^data\.context, context 2: both views must end.*'.*Hm\.', the teacher's"):
        with_template(tmp_path, SWITCHES, train=train, context=str(contexts)).setup("fit")
    own = write_rows({"query": "a", "context": "/no_think"}, {"query": "b /no_think", "context": "c"}, name="own.jsonl")
    with pytest.raises(UserError, match=r"own\.jsonl:1: both views must end"):
        with_template(tmp_path, SWITCHES, train=own).setup("fit")
    module = with_template(tmp_path, SWITCHES, train=own, on_bad_row="skip")
    with pytest.warns(UserWarning, match="1 bad rows skipped"):
        module.setup("fit")
    assert [e.query for e in module.examples("train")] == ["b /no_think"]
    with_template(tmp_path, SWITCHES, predict=own).setup("predict")  # nothing is compared there
