"""How questions are made, with an asker whose words are known; and the command with real models and a server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opcd.queries.askers import Asker, Tried
from opcd.queries.documents import Document
from opcd.queries.making import BATCH, FACT_KINDS, Maker, Plan, Request, kind_of, rows
from opcd.queries.parts import chunks
from opcd.runtime.errors import UserError
from opcd.writing.journal import Journal
from opcd.writing.written import Written

FACTS = "\n".join(f"- Ferry number {n} of Lindholm sails to Island{n}." for n in range(20))
MANNER = "You are the assistant of a shop. Always be polite. Never use lists. Answer in one sentence. Tea costs 6."


class Scripted(Asker):
    """Asks about a ferry by its number, in another way each time; its answers say the island."""

    name, least_effect = "scripted", 0.1

    def __init__(self, effect=1.0, second=None, question=None):
        self.effect, self.second, self.question, self.calls = effect, second, question, 0
        self.temperatures = []

    def count(self, text):
        return len(text.split())

    def write(self, conversations, seed, temperature):
        self.temperatures.append(temperature)
        self.calls += 1
        written = []
        for conversation in conversations:
            last = conversation[-1]["content"]
            number = last.rpartition("Ferry number ")[2].split()[0] if "Ferry number" in last else "0"
            text = self.question or f"Which way does ferry {number} of Lindholm go on day {seed}?"
            written.append(Written(text, 7, False))
        return written

    def try_out(self, questions, context, seed):
        answers = [f"It goes to Island{question.partition('ferry ')[2].split()[0]}." for question in questions]
        return [Tried(answer, self.second or answer, self.effect) for answer in answers]


def maker(tmp_path, asker=None, text=FACTS, most=1000, **plan):
    cut = chunks([Document("ferries.md", text)], most, lambda words: len(words.split()))
    plan = Plan(**{"kind": "facts", **plan})
    return Maker(asker or Scripted(), cut, plan, Journal(tmp_path / "asked.jsonl"))


def test_rows_have_a_query_its_reference_and_its_part(tmp_path):
    made = maker(tmp_path, train=30, val=6)
    made.run()
    found = rows(made)
    assert len(found.train) == 30 and len(found.val) == 6
    for row in [*found.train, *found.val]:
        number = row["query"].partition("ferry ")[2].split()[0]
        assert row.get("reference") in (f"Island{number}", None) and "context" not in row
    assert sum("reference" in row for row in found.train) >= 20  # that of two facts may be of the other one
    assert not {row["part"] for row in found.train} & {row["part"] for row in found.val}
    report = found.report
    assert report["kept"] + sum(report["dropped"].values()) == report["asked"] == len(made.journal.records)
    assert set(report["kept_by_kind"]) <= set(FACT_KINDS)


def test_rounds_ask_in_other_ways_and_get_warmer_and_see_what_was_asked(tmp_path):
    asker = Scripted()
    made = maker(tmp_path, asker, train=50, val=0, temperature=0.3)
    made.run()
    kinds = [record["kind"] for record in made.journal.records]
    assert kinds[:20] == ["direct"] * 20 and kinds[20:40] == ["reworded"] * 20
    assert asker.temperatures[0] == pytest.approx(0.3) and asker.temperatures[2] == pytest.approx(0.4)
    request = next(iter(made._batches()))[0]
    asked = [record["query"] for record in made.journal.records if record["part"] == request.part.name]
    assert asked[-1] in made.conversation(request)[-1]["content"]


def test_few_questions_are_spread_over_the_whole_context(tmp_path):
    made = maker(tmp_path, train=10, val=0)
    made.run()
    assert len({record["part"] for record in made.kept}) == 20
    assert len({row["part"] for row in rows(made).train}) == 10

    (tmp_path / "sample").mkdir()
    sample = maker(tmp_path / "sample", train=3, val=1)
    sample.run()
    asked = {record["part"] for record in sample.journal.records}
    assert len(asked) == 8 and max(int(part.rpartition("/")[2]) for part in asked) > 10
    assert rows(sample).report["coverage_by_chunk"]["1"].endswith("of 20 parts")


def test_a_run_that_was_killed_goes_on_to_the_same_rows(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = maker(tmp_path / "whole", train=40, val=4)
    whole.run()
    killed = maker(tmp_path / "killed", train=40, val=4)
    (tmp_path / "killed").mkdir()
    killed.journal.append(killed._made(next(iter(killed._batches()))))
    asker, first = Scripted(), len(killed.journal.records)
    resumed = maker(tmp_path / "killed", asker, train=40, val=4)
    resumed.run()
    without_time = [{**record, "seconds": 0} for record in whole.journal.records]
    assert [{**record, "seconds": 0} for record in resumed.journal.records] == without_time
    assert first == BATCH and asker.calls == sum(record["batch"][0] == 0 for record in without_time) - 1
    assert rows(resumed).train == rows(whole).train


@pytest.mark.parametrize(
    ("asker", "why"),
    [
        (Scripted(effect=0.01), "the context does not change the answer"),
        (Scripted(second="Nobody can tell you that, I am afraid."), "two answers with the context disagree"),
        (Scripted(question="Is ferry 3 of Lindholm the one that goes to Island3?"), "gives the answer away"),
        (Scripted(question="According to the text, where does ferry 3 of Lindholm go?"), "names the text"),
    ],
)
def test_the_contexts_own_test_and_the_rules(tmp_path, asker, why):
    made = maker(tmp_path, asker, train=5, val=0)
    made.run()
    with pytest.raises(UserError, match=r"none of \d+ questions was kept") as refused:
        rows(made)
    assert why in str(refused.value) and "such as" in str(refused.value)


def test_of_a_long_context_each_row_has_its_chunk(tmp_path):
    text = "\n\n".join(f"Ferry number {n} of Lindholm sails to Island{n}." for n in range(20))
    made = maker(tmp_path, text=text, most=60, train=40, val=0)
    made.run()
    found = rows(made)
    assert len({row["context"] for row in found.train}) == len(made.chunks) > 1
    assert all(row["part"].split("/")[1] for row in found.train)
    for row in found.train:
        assert f"number {row['query'].partition('ferry ')[2].split()[0]} of" in row["context"]
    assert len(found.report["coverage_by_chunk"]) == len(made.chunks)


def test_val_that_leaves_nothing_to_train_on(tmp_path):
    made = maker(tmp_path, text="Ferry number 3 of Lindholm sails to Island3.", train=2, val=50)
    made.run()
    with pytest.raises(UserError, match="--val 50: nothing is left to train on"):
        rows(made)


def test_a_manner_is_asked_about_by_topics_and_has_no_references(tmp_path):
    asker = Scripted()
    made = maker(tmp_path, asker, text=MANNER, kind="manner", train=20, val=5)
    made.run()
    found = rows(made)
    assert all(row["part"].startswith("topic/") and "reference" not in row for row in [*found.train, *found.val])
    prompt = made.conversation(Request(0, made.parts[0], "manner"))[-1]["content"]
    assert MANNER in prompt and "Topic: " in prompt


def test_the_kind_is_told_from_the_sentences():
    assert kind_of(MANNER) == "manner"
    assert kind_of(FACTS) == "facts"
    assert kind_of("Answer in one short sentence. The cat is Pickle. The cook is Ada. The price is 3.") == "facts"


def test_prompts_of_the_users_own(tmp_path):
    (tmp_path / "direct.txt").write_text("Ask about {{ text }} in {{ passage }}\n---\nWho?\n---\nOwn {{ text }}\n")
    made = maker(tmp_path, prompts=tmp_path)
    turns = made.conversation(next(iter(made._batches()))[0])
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[-1]["content"] == "Own Ferry number 0 of Lindholm sails to Island0."
    (tmp_path / "direct.txt").write_text("{{ text }} {{ passage }} {{ nothing }}")
    with pytest.raises(UserError, match="unknown name nothing"):
        maker(tmp_path, prompts=tmp_path)


def fit_reads(path) -> None:
    from opcd.data import parse_rows, read_rows

    assert parse_rows(read_rows(str(path), "data.train"), "data.train")


def test_the_command_with_the_packaged_model(opcd, tmp_path):
    context = tmp_path / "ferry.txt"
    context.write_text("The captain of the Silverfin Ferry is Nora Kestrel.\n\nThe Silverfin Ferry sails to Marrow.\n")
    words = ["queries", "--context", context, "--count", 1, "--val", 0, "--answer_tokens", 16]
    code, text = opcd(*words, "--out", tmp_path / "out", "--dry_run")
    assert code == 0 and "2 parts (facts)" in text and not (tmp_path / "out").exists()
    code, text = opcd(*words, "--out", tmp_path / "out")
    assert code == 0, text
    row = json.loads((tmp_path / "out/train.jsonl").read_text())
    assert row["query"].endswith("?") and row["part"].startswith("ferry.txt/1/")
    fit_reads(tmp_path / "out/train.jsonl")
    assert "opcd fit --config" in text and json.loads((tmp_path / "out/report.json").read_text())["kept"] >= 1
    assert (tmp_path / "out/context.txt").read_text() == context.read_text()
    context.write_text("Another text of two sentences. It says other things.")
    code, text = opcd(*words, "--out", tmp_path / "out")
    assert code == 2 and "differs in context" in text


class Chat(BaseHTTPRequestHandler):
    """A server of the OpenAI protocol that knows one answer."""

    dies_after = None
    served = 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Chat.served += 1
        if Chat.dies_after is not None and Chat.served > Chat.dies_after:
            self.send_error(400, "no more")
            return
        messages = body["messages"]
        asks = "Sentence" in messages[-1]["content"]
        with_context = messages[0]["role"] == "system"
        text = f"Where does ferry {Chat.served} of Lindholm number {messages[-1]['content'][-9:]} go?"
        answer = text if asks else "It sails to Island7 today." if with_context else "I cannot know that."
        choice = {"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        content = json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Print nothing."""


@pytest.fixture
def server():
    Chat.served, Chat.dies_after = 0, None
    served = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()
    thread.join()


def test_a_server_asks_and_its_death_keeps_what_was_written(opcd, tmp_path, server):
    context = tmp_path / "ferries.txt"
    context.write_text("\n".join(f"- Ferry number {n} of Lindholm sails to Island7." for n in range(30)))
    words = ["queries", "--context", context, "--out", tmp_path / "out", "--server", server, "--name", "m"]
    words += ["--count", 20, "--val", 4]
    Chat.dies_after = 70
    code, text = opcd(*words)
    assert code == 2 and "the same command resumes" in text and "no more" in text
    kept = (tmp_path / "out/asked.jsonl").read_text().count("\n")
    assert kept == BATCH
    Chat.dies_after = None
    code, text = opcd(*words)
    assert code == 0, text
    assert len((tmp_path / "out/train.jsonl").read_text().splitlines()) == 20
    fit_reads(tmp_path / "out/train.jsonl")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--server", "http://127.0.0.1:9"], "--server wants --name"),
        (["--name", "m"], "give --server too"),
        (["--api_key_env", "KEY"], "--api_key_env has no effect"),
        (["--server", "http://127.0.0.1:9", "--name", "m", "--device", "cpu"], "--device has no effect"),
        (["--count", "0"], "--count must be at least 1"),
        (["--val", "-1"], "--val must be at least 0"),
        (["--prompts", "nowhere"], "nowhere is not a folder"),
        (["--temperature", "9"], "--temperature must be from 0 to 2"),
        (["--chunk_tokens", "100000"], "has room for"),
        (["--model", "smollm2-135"], "did you mean smollm2-135m"),
    ],
)
def test_wrong_words(opcd, tmp_path, words, says):
    (tmp_path / "a.txt").write_text("The captain of the Silverfin Ferry is Nora Kestrel.")
    code, text = opcd("queries", "--context", tmp_path / "a.txt", "--out", tmp_path / "out", *words)
    assert code == 2 and says in text and not (tmp_path / "out/asked.jsonl").exists()


def test_init_with_a_context_writes_a_folder_that_is_ready_to_fit(opcd, tmp_path, server, tiny, monkeypatch):
    context = tmp_path / "ferries.txt"
    context.write_text("\n".join(f"- Ferry number {n} of Lindholm sails to Island7." for n in range(30)))
    words = ["init", tmp_path / "mine", "--context", context, "--server", server, "--name", "m", "--count", 8]
    code, text = opcd(*words, "--val", 2)
    assert code == 0, text
    assert "opcd fit --config recipe.yaml" in text and "questions kept (facts, m)" in text
    monkeypatch.chdir(tmp_path / "mine")
    code, text = opcd("fit", "--config", "recipe.yaml", "--model.student.name", tiny, "--trainer.max_steps", 1)
    assert code == 0, text
    code, text = opcd(*words, "--val", 2)
    assert code == 2 and "is not empty" in text


def test_init_of_a_context_in_chunks_and_without_held_out_rows(opcd, tmp_path, server):
    context = tmp_path / "ferries.txt"
    context.write_text("\n\n".join(f"Ferry number {n} of Lindholm sails to Island7." for n in range(30)))
    words = ["--context", context, "--server", server, "--name", "m", "--count", 60, "--val", 0, "--chunk_tokens", 60]
    code, text = opcd("init", tmp_path / "mine", *words)
    assert code == 0, text
    recipe = (tmp_path / "mine/recipe.yaml").read_text()
    assert "\n  context: null " in recipe and "\n  val: null " in recipe
    train = [json.loads(line) for line in (tmp_path / "mine/train.jsonl").read_text().splitlines()]
    assert all("context" in row for row in train)
    steps = -(-6 * len(train) // 8)  # six passes in batches of eight
    assert steps > 36 and f"max_steps: {steps} " in recipe and f"total_iters: {steps}}}" in recipe


def test_options_of_queries_without_a_context(opcd, tmp_path):
    code, text = opcd("init", tmp_path / "mine", "--count", 3)
    assert code == 2 and "no option --count" in text and not (tmp_path / "mine").exists()
