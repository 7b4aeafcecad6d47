"""A teacher behind a server: the numbers of the model at hand, and an end to whatever the server does wrong."""

import importlib.util
import json
import os
import random
import signal
import socket
import threading
import time
from contextlib import ExitStack
from email.utils import formatdate

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from benchmarks.tiny import make_tiny
from opcd.losses import JSD, ForwardKL, ReverseKL, SampledReverseKL, TopK
from opcd.losses.log_probs import NEVER
from opcd.models import ModelConfig
from opcd.models.hub_access import hub_reachable
from opcd.modules import (
    Distiller,
    FrozenTeacher,
    MixedRollout,
    RecordedRollout,
    RoutedTeachers,
    ServedTeacher,
    Student,
    TeacherRollout,
    Trajectories,
)
from opcd.modules.objective import Objective
from opcd.modules.trajectories import Trajectory
from opcd.modules.validation import Run, validate
from opcd.runtime import interruption
from opcd.runtime.errors import StepAbandoned, UserError
from opcd.runtime.interruption import Interrupted
from opcd.serving import client
from opcd.serving.client import LONGEST, pause
from opcd.serving.served_model import COMPLETIONS, GENERATE, MODELS, TOKENIZE
from tests.helpers.teacher_server import Served, serving
from tests.helpers.vllm_server import cached_tokens_of, vllm_here, vllm_serving

TOP = TopK(ReverseKL(), k=4, support="teacher")
HASTY = {"timeout": 0.3, "patience": 0.4}
BRIEF = {"timeout": 30.0, "patience": 0.4}
CACHE = ("--enable-scale-out", "--enable-prompt-tokens-details", "--block-size", 32)
KEY = "planted-KEY-0123456789"


SESSIONS = ExitStack()


@pytest.fixture(autouse=True)
def closed_sessions():
    yield
    SESSIONS.close()


def ask(teacher, trajectories):
    """Begin a session, which ends with the test: its scores are there from now on."""
    SESSIONS.enter_context(teacher.session(trajectories))


@pytest.fixture(scope="module")
def served(tiny_teacher):
    """The other tiny model."""
    return Served(tiny_teacher)


@pytest.fixture
def server(served, monkeypatch):
    """It behind a server of this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(served) as running:
        yield running


@pytest.fixture(scope="module")
def student(tiny):
    return Student.load(ModelConfig(name=tiny))


@pytest.fixture(scope="module")
def trajectories():
    """Responses of one to five tokens under one context; the last two rows are the same."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(49152, (16 + n % 5,), generator=draw) for n in range(8)]
    prompts = [torch.cat([ids[0][:8], row[:15]]) for row in ids]
    rows = zip(ids, prompts, ["one", "other"] * 4, strict=True)
    written = Trajectories([Trajectory(x[8:15], q, ids[0][:8], x[15:], True, None, name) for x, q, name in rows])
    return written.select([*range(8), 7])


@pytest.fixture
def connected(server, student):
    """A teacher that has met its server, for a loss; what it has asked so far is forgotten."""

    def make(loss=TOP, **options):
        teacher = ServedTeacher(server.url, "teacher", concurrency=3)
        teacher.serve(loss)
        teacher.connect(student.tokenizer)
        teacher.setup(student, ModelConfig(), torch.device("cpu"))
        server.seen.clear()
        vars(teacher._model.server).update(options)  # from here on: a busy machine may be slow to connect
        return teacher

    return make


@pytest.mark.parametrize(
    "loss", [TOP, TopK(JSD(0.5), k=20, support="teacher", tail="renormalize"), SampledReverseKL()], ids=str
)
def test_values_and_gradients_are_those_of_the_model_at_hand(loss, connected, student, trajectories, tiny_teacher):
    at_hand = FrozenTeacher(ModelConfig(name=tiny_teacher, dtype="float32"))
    at_hand.setup(student, ModelConfig(), torch.device("cpu"))
    served = connected(loss)
    ask(served, trajectories)
    found = []
    for teacher in (served, at_hand):
        student.zero_grad()
        for rows in ([0, 3, 8], [1, 2, 4, 5, 6, 7]):  # as micro-batches
            part = trajectories.select(rows)
            measured = Objective(loss, 1.0, None)(student.score(part), teacher.score(part, 4096), part)
            measured["divergence"].sum().backward()
        found.append((measured, [weight.grad for weight in student.parameters()]))
    (served_values, served_gradients), (values, gradients) = found
    for name in served_values:
        assert_close(served_values[name], values[name], rtol=1e-4, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3
    assert_close(served_gradients, gradients, rtol=1e-3, atol=1e-5)


def test_rows_are_sent_whole_and_equal_ones_once(connected, server, trajectories):
    server.fault = lambda handler, path, answer: time.sleep(0.02) or answer
    ask(connected(), trajectories)
    bodies = [body for path, body, _ in server.seen if path == COMPLETIONS]
    rows = zip(trajectories.teacher_prompts, trajectories.responses, strict=True)
    assert sorted(body["prompt"] for body in bodies) == sorted(torch.cat(row).tolist() for row in list(rows)[:8])
    assert {(body["prompt_logprobs"], body["max_tokens"], body["model"]) for body in bodies} == {(4, 1, "teacher")}
    assert 2 <= server.most <= 3


def paths(server):
    return {path for path, *_ in server.seen} - {MODELS}


@pytest.mark.parametrize("cache", ["left out", "filled"])
@pytest.mark.parametrize("loss", [TOP, SampledReverseKL()], ids=str)
def test_contexts_come_from_the_servers_cache(loss, cache, connected, server, trajectories):
    whole, rows = connected(loss), trajectories.select([*range(8)])
    ask(whole, rows)
    assert paths(server) == {COMPLETIONS}
    server.cache = cache
    cached = connected(loss)
    ask(cached, rows)
    assert paths(server) == {GENERATE}
    assert sum(server.cached) >= 5 * 8, server.cached  # the context's eight tokens; three rows are asked for at a time
    assert_close(vars(cached.score(rows, 0)), vars(whole.score(rows, 0)))


def test_what_a_server_is_asked_first_is_never_cached(connected, server):
    """What V1 says of cached tokens may be no JSON; then the run would not use the cache at all."""
    server.cache = "filled"
    assert all(connected()._model.tells_cached for _ in range(3))
    assert server.cached == [0, 0, 0]


def test_a_response_that_was_cached_is_asked_for_again(connected, server, trajectories, caplog):
    server.cache = "filled"
    teacher = connected()
    ask(teacher, trajectories)
    first = teacher.score(trajectories, 0)
    server.seen.clear()
    with caplog.at_level("INFO"):
        ask(teacher, trajectories)  # every row is in the cache now, up to its response's last tokens
    assert paths(server) == {GENERATE, COMPLETIONS}
    assert caplog.text.count("came from its cache, without log-probabilities; the ordinary request is made") == 1
    assert_close(vars(teacher.score(trajectories, 0)), vars(first))


@pytest.mark.parametrize(
    "fault",
    [
        lambda handler, path, answer: handler.say(500, {"error": {"message": "Out of range float values"}}),
        lambda handler, path, answer: handler.send(200, b'{"prompt_logprobs": [nul'),
        lambda handler, path, answer: answer | {"prompt_logprobs": [None, {"5": {"logprob": 1e28}}] * 20},
        lambda handler, path, answer: answer | {"model": "another"},
        lambda handler, path, answer: time.sleep(1),
    ],
    ids=["500", "cut", "junk", "another model", "stalls"],
)
def test_what_the_cache_does_not_give_is_computed(fault, connected, server, trajectories):
    server.cache = "left out"
    whole, cached = connected(), connected(timeout=0.3, patience=20)
    whole._model.tells_cached = False
    ask(whole, trajectories)
    server.fault = lambda handler, path, answer: fault(handler, path, answer) if path == GENERATE else answer
    ask(cached, trajectories)
    assert {GENERATE, COMPLETIONS} <= paths(server)
    assert_close(vars(cached.score(trajectories, 0)), vars(whole.score(trajectories, 0)))


def test_several_served_teachers_are_each_asked_for_their_own_rows(connected, server, student, trajectories):
    several = RoutedTeachers({"one": connected(), "other": connected()})
    ask(several, trajectories)
    asked = sum(path == COMPLETIONS for path, *_ in server.seen)
    assert asked == 8
    alone = connected()
    ask(alone, trajectories)
    part = trajectories.select([0, 3, 4])
    found, expected = (
        Objective(TOP, 1.0, None)(student.score(part), teacher.score(part, 4096), part)["divergence"]
        for teacher in (several, alone)
    )
    assert_close(found, expected)


def test_what_the_student_has_no_token_for_is_mass_of_the_others(connected, server, student, trajectories):
    teacher = connected()
    ask(teacher, trajectories)
    whole = teacher.score(trajectories, 4096)
    teacher._vocabulary = 40000  # the server's is longer
    cut = teacher.score(trajectories, 4096)
    padding = whole.tokens >= 40000
    assert padding.any() and not padding.all()
    assert (cut.tokens[padding] == 40000).all() and (cut.log_probs[padding] == NEVER).all()
    assert_close(cut.log_probs[~padding], whole.log_probs[~padding])
    student_log_probs = torch.randn(len(cut.tokens), 40000).log_softmax(-1)
    expected = []
    for row, ids, log_p in zip(student_log_probs, whole.tokens, whole.log_probs, strict=True):
        kept = ids < 40000
        ours, theirs = row[ids[kept]].exp(), log_p[kept].exp()
        ours, theirs = (torch.cat([p, (1 - p.sum())[None]]) for p in (ours, theirs))
        expected.append((ours * (ours / theirs).log()).sum())
    assert_close(
        TOP.values_of_record(student_log_probs, cut.tokens, cut.log_probs)["divergence"],
        torch.stack(expected),
        rtol=1e-3,
        atol=1e-4,
    )


def completions(act):
    """A fault that meets completions alone."""
    return lambda handler, path, answer: act(handler, answer) if path == COMPLETIONS else answer


def status(code, **headers):
    return completions(lambda handler, answer: handler.say(code, {"error": {"message": "not now"}}, **headers))


def changed(change):
    """An answer of 200 that is not as it should be."""

    def act(handler, answer):
        tables = answer["choices"][0]["prompt_logprobs"]
        change(answer, tables, next(iter(tables[-1].values())))
        return answer

    return completions(act)


def keep(table, number):
    while len(table) > number:
        table.popitem()


def cut(handler, answer, length=None):
    data = json.dumps(answer).encode()
    handler.close_connection = True
    handler.send(200, data[: len(data) // 2], length and len(data))


def stall(handler, answer, seconds=2):
    handler.close_connection = True
    time.sleep(seconds)


def drip(handler, answer):
    handler.close_connection = True
    handler.send(200, b"{", 1000)
    for _ in range(40):
        time.sleep(0.05)
        handler.wfile.write(b" ")
        handler.wfile.flush()


def flood(handler):
    handler.close_connection = True
    handler.send(200, b" " * 2**21)


def die(handler, answer):
    handler.server.shutdown()
    handler.server.server_close()
    handler.close_connection = True


DRILLS = {
    "dies": (completions(die), None, "attempts"),
    "stalls": (completions(stall), None, "no answer within .* given up after"),
    "drips": (completions(drip), None, "no answer within"),
    "hangs up": (completions(lambda handler, answer: setattr(handler, "close_connection", True)), None, "disconnected"),
    "429 for a while": (status(429, Retry_After="0"), 2, None),
    "429 for ever": (status(429), None, "HTTP 429 not now; given up after"),
    "429 for too long": (status(429, Retry_After="3600"), None, "HTTP 429 not now; given up after 1 attempts"),
    "500 for a while": (status(500), 2, None),
    "500 for ever": (status(500), None, "HTTP 500 not now; given up after"),
    "503 for a while": (status(503), 2, None),
    "403": (status(403), None, "HTTP 403 not now; the key comes from the environment variable OPCD_TEACHER_KEY"),
    "cut JSON": (completions(cut), None, "its answer is truncated or invalid JSON; given up after"),
    "cut JSON once": (completions(cut), 1, None),
    "torn connection": (completions(lambda *both: cut(*both, length=True)), None, "RemoteProtocolError"),
    "no tables": (changed(lambda a, tables, e: a["choices"][0].pop("prompt_logprobs")), None, "no prompt_logprobs"),
    "another form": (completions(lambda handler, answer: [answer]), None, "not of vLLM's form"),
    "a position less": (changed(lambda a, tables, e: tables.pop()), None, r"(\d+) positions for a prompt of"),
    "a position more": (changed(lambda a, tables, e: tables.append(tables[-1])), None, "positions for a prompt of"),
    "another token": (
        changed(lambda a, tables, e: tables.insert(1, tables.pop())),
        None,
        "a position lacks the token that was sent",
    ),
    "fewer tokens": (
        changed(lambda a, tables, e: keep(tables[-1], 3)),
        None,
        "tokens at a position where 4 were asked",
    ),
    "NaN": (changed(lambda a, tables, e: e.update(logprob=float("nan"))), None, "nan for a log-probability"),
    "-inf": (changed(lambda a, tables, e: e.update(logprob=-float("inf"))), None, "-inf for a log-probability"),
    "above 0": (changed(lambda a, tables, e: e.update(logprob=0.5)), None, "0.5 for a log-probability"),
    "no number": (changed(lambda a, tables, e: e.update(logprob=None)), None, "not of vLLM's form"),
    "no probabilities": (
        changed(lambda a, tables, e: [entry.update(logprob=-0.1) for entry in tables[-1].values()]),
        None,
        "sum to more than 1",
    ),
    "another name": (changed(lambda a, tables, e: a.update(model="other")), None, "answered by other; it was teacher"),
    "another model": (
        lambda handler, path, answer: json.loads(json.dumps(answer).replace(handler.server.served.root, "/other")),
        None,
        r"serves another teacher now: Card\(root='/other'",
    ),
    "a negative id": (changed(lambda a, tables, e: tables[-1].update({"-5": dict(e)})), None, "'-5', not a token id"),
    "a huge id": (changed(lambda a, tables, e: tables[-1].update({str(2**40): dict(e)})), None, "not a token id"),
    "an id that is no number": (
        changed(lambda a, tables, e: tables[-1].update(x=dict(e))),
        None,
        "'x', not a token id",
    ),
    "a table that is a list": (changed(lambda a, tables, e: tables.__setitem__(-1, [1])), None, "list, not a table"),
    "a table that is null": (changed(lambda a, tables, e: tables.__setitem__(-1, None)), None, "None, not a table"),
    "an entry that is a number": (changed(lambda a, tables, e: tables[-1].update({"3": -1.0})), None, "not an object"),
    "a text for a number": (changed(lambda a, tables, e: e.update(logprob="-1")), None, "'-1', not a number"),
    "a bool for a number": (changed(lambda a, tables, e: e.update(logprob=False)), None, "False, not a number"),
    "tables that are an object": (
        changed(lambda a, tables, e: a["choices"][0].update(prompt_logprobs={})),
        None,
        "dict, not a list",
    ),
    "no choices": (changed(lambda a, tables, e: a.update(choices=[])), None, "0 values instead of 1"),
    "two choices": (changed(lambda a, tables, e: a["choices"].append(1)), None, "2 values instead of 1"),
    "choices that are a text": (changed(lambda a, tables, e: a.update(choices="x")), None, "'x', not a list"),
    "null": (completions(lambda handler, answer: handler.say(200, None)), None, "None, not an object"),
    "nested": (
        completions(lambda handler, answer: handler.send(200, b'{"choices":' + b"[" * 200_000)),
        None,
        "nested too deeply",
    ),
    "an error that is nested": (
        completions(lambda handler, answer: handler.send(400, b'{"error":' + b"[" * 200_000)),
        None,
        "HTTP 400",
    ),
    "an answer without end": (
        completions(lambda handler, answer: flood(handler)),
        None,
        "its answer is larger than 1 MiB",
    ),
    "a Retry-After that is none": (status(429, Retry_After="nan"), 2, None),
    "a Retry-After of a far year": (status(429, Retry_After="Fri, 31 Dec 99999999 23:59:59 GMT"), 2, None),
    "an escape sequence": (
        completions(lambda handler, answer: handler.say(400, {"error": {"message": "\x1b]52;c;x\x07 \u202e"}})),
        None,
        r"HTTP 400 \\x1b\]52;c;x\\x07 \\u202e",
    ),
    "no model": (
        lambda handler, path, answer: {"data": [{"id": "other"}]} if path == MODELS else answer,
        None,
        "serves no model teacher, but other",
    ),
}


@pytest.mark.case("B9")
@pytest.mark.parametrize("name", DRILLS)
def test_whatever_a_server_does_has_an_end(name, connected, server, trajectories, monkeypatch):
    fault, until, says = DRILLS[name]
    teacher = connected(**HASTY if name in ("stalls", "drips") else BRIEF if until is None else {})
    server.fault, server.until = fault, until
    monkeypatch.setattr(client, "LARGEST", 2**20)
    begun = time.monotonic()
    if says is None:
        ask(teacher, trajectories)
        assert teacher.score(trajectories, 4096).tokens.shape == (sum(map(len, trajectories.responses)), 4)
    else:
        with pytest.raises(StepAbandoned, match=says) as raised:
            ask(teacher, trajectories)
        assert "--ckpt_path last" in str(raised.value) and server.url in str(raised.value)
    assert time.monotonic() - begun < 5


@pytest.mark.case("B9")
@pytest.mark.parametrize("key", ["sk-planted-7c1e", 'q"u\\o%te'])
@pytest.mark.parametrize(
    "echo",
    [
        lambda handler, key: handler.say(400, {"error": {"message": f"Bearer {key} is wrong"}}),
        lambda handler, key: handler.send(400, f"no JSON: {key}".encode()),
        lambda handler, key: handler.send(400, b"x" * 290 + key.encode()),
        lambda handler, key: handler.say(200, {"choices": key}),
        lambda handler, key: handler.say(200, {"choices": [{"prompt_logprobs": [{key: {}}] * 99}]}),
        lambda handler, key: handler.say(503, {"error": {"message": key}}),
    ],
)
def test_a_key_that_a_server_echoes_is_masked(echo, key, connected, server, trajectories, monkeypatch):
    monkeypatch.setenv("OPCD_TEACHER_KEY", key)
    teacher = connected(**BRIEF)
    server.fault = completions(lambda handler, answer: echo(handler, key))
    with pytest.raises(StepAbandoned) as raised:
        ask(teacher, trajectories)
    assert key not in str(raised.value) and key[:6] not in str(raised.value)


@pytest.mark.case("B9")
@pytest.mark.parametrize(
    ("path", "answer", "says"),
    [
        (MODELS, [], "lists no models: .* list, not an object"),
        (MODELS, {"data": [{"id": 3}]}, "id is 3, not a text"),
        (MODELS, {"data": [{"id": ["teacher"]}]}, "id is list, not a text"),
        (MODELS, {"data": [{"id": "teacher", "max_model_len": "512"}]}, "max_model_len is '512'"),
        (MODELS, {"data": [{"id": "teacher", "max_model_len": -1}]}, "max_model_len is -1"),
        (MODELS, {"data": [{"id": "teacher", "root": {}}]}, "root is dict"),
        (MODELS, {"data": []}, "serves no model teacher, but none"),
        ("/tokenize", {"tokens": {"a": 1}}, None),
        ("/tokenize", {"tokens": [-1]}, None),
        ("/tokenize", [1], None),
    ],
)
def test_what_a_server_says_first_is_checked(path, answer, says, connected, server):
    server.fault = lambda handler, asked, due: handler.say(200, answer) if asked == path else due
    if says is None:
        connected()
        return
    with pytest.raises(UserError, match=says):
        connected()


@pytest.mark.case("E9", "E8")
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("http_proxy", "gopher://proxy:1", "not a proxy scheme"),
        ("http_proxy", "http://proxy:99999", "http_proxy: not a valid address"),
        ("https_proxy", "http://proxy:abc", "https_proxy: not a valid address"),
        ("all_proxy", "socks5://proxy:1080", "needs the package socksio"),
        ("ALL_PROXY", "socks4://proxy", "not a proxy scheme"),
        ("http_proxy", "http://[::1", "not a valid address"),
        ("http_proxy", "://", "not a valid address"),
        ("http_proxy", "gopher://me:planted@proxy", r"got gopher://\*\*\*@proxy"),
    ],
)
def test_a_proxy_that_is_none_is_one_message(name, value, says, connected, server, monkeypatch):
    monkeypatch.setenv(name, value)
    if "socks5" in value and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is installed")
    with pytest.raises(UserError, match=says) as raised:
        connected()
    assert "planted" not in str(raised.value)
    monkeypatch.setattr("opcd.models.hub_access.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=says):
        hub_reachable()


def test_a_signal_is_noticed_while_a_server_is_waited_for(connected, server, trajectories):
    teacher = connected()
    server.fault = completions(lambda handler, answer: stall(handler, answer, 5))
    threading.Timer(0.2, interruption.ask, (signal.SIGTERM,)).start()
    begun = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            ask(teacher, trajectories)
    finally:
        interruption.reset()
    assert time.monotonic() - begun < 4


def test_an_interrupt_does_not_wait_for_the_server(connected, server, trajectories):
    def interrupted(*_):
        raise KeyboardInterrupt

    teacher = connected()
    server.fault = completions(lambda handler, answer: stall(handler, answer, 5))
    former = signal.signal(signal.SIGUSR2, interrupted)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(teacher, trajectories)
    finally:
        signal.signal(signal.SIGUSR2, former)
    assert time.monotonic() - begun < 4


def test_pauses_double_and_a_server_may_ask_for_longer_ones():
    state = random.getstate()
    for attempt, longest in ((1, 0.25), (2, 0.5), (5, 4.0), (1000, LONGEST)):
        pauses = [pause(attempt, None) for _ in range(50)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
    for odd in ("nan", "", "-5", "Fri, 31 Dec 99999999 23:59:59 GMT", "\x1b", "1 2 3 4 5 6 7"):
        assert 0 < pause(1, odd) < 1
    assert pause(1, "7") == 7 and pause(1, "0") > 0.1 and pause(1, "soon") > 0.1
    assert 50 < pause(1, formatdate(time.time() + 60, usegmt=True)) <= 60
    assert random.getstate() == state  # training draws from it


def refused_socket():
    """The address of a port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_server_that_is_not_there(student):
    teacher = ServedTeacher(refused_socket(), "teacher", **BRIEF)
    with pytest.raises(UserError, match=r"init_args: http://127.0.0.1:\d+/v1/models: ConnectError.*given up after"):
        teacher.connect(student.tokenizer)


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        (
            MODELS,
            lambda answer: {"data": [{"id": "other"}, {"id": "third"}]},
            "serves no model teacher, but other, third",
        ),
        (MODELS, lambda answer: {"models": []}, "/v1/models lists no models"),
        (TOKENIZE, lambda answer: {"tokens": answer["tokens"][::-1]}, "has another tokenizer than model.student"),
        (COMPLETIONS, lambda answer: {"choices": [{"text": "a"}]}, "its answer has no prompt_logprobs; vLLM's has"),
    ],
)
def test_a_server_that_is_not_the_right_one(path, change, says, server, student):
    server.fault = lambda handler, asked, answer: change(answer) if asked == path else answer
    with pytest.raises(UserError, match=says):
        ServedTeacher(server.url, "teacher").connect(student.tokenizer)


def test_a_server_that_does_not_tokenize(server, student, connected):
    """Its tokens' texts are compared instead."""

    def fault(handler, path, answer):
        if path == TOKENIZE:
            return handler.say(404, {"detail": "Not Found"})
        for table in answer["choices"][0]["prompt_logprobs"][1:] if shifted and path == COMPLETIONS else ():
            for entry in table.values():
                entry["decoded_token"] = entry["decoded_token"].swapcase()
        return answer

    server.fault, shifted = fault, False
    connected()
    shifted = True
    with pytest.raises(UserError, match=r"another tokenizer than model\.student's: token"):
        connected()


def test_too_many_tokens_for_the_server(server, connected):
    server.max_logprobs = 3
    with pytest.raises(UserError, match="max allowed: 3; start the server with --max-logprobs 4"):
        connected()


def test_an_adapter_has_the_window_of_its_base(server, connected):
    base = {"id": "base", "max_model_len": 100}
    adapter = {"id": "teacher", "root": "lora", "parent": "base", "max_model_len": None}
    server.fault = lambda handler, path, answer: {"data": [base, adapter]} if path == MODELS else answer
    assert connected().reader.window == 99


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be"),
        ({"base_url": "http://localhost:8000/v1"}, "without /v1"),
        ({"base_url": f"http://user:{KEY}@localhost:8000"}, "must not be in a config"),
        ({"base_url": f"http://localhost:8000/?key={KEY}"}, "must not be in a config"),
        ({"api_key_env": KEY}, "must be the name of an environment variable"),
        ({"concurrency": 0}, "concurrency >= 1"),
        ({"timeout": 0.0}, "timeout > 0"),
        ({"base_url": "http://localhost:99999"}, "a port must be from 1"),
        ({"base_url": "http://localhost:-1"}, "a port must be from 1"),
    ],
)
def test_arguments_that_make_no_sense(options, says):
    with pytest.raises(ValueError, match=says) as raised:
        ServedTeacher(**{"base_url": "http://localhost:8000", "name": "teacher"} | options)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("loss", "temperature", "rollout", "says"),
    [
        (ReverseKL(), 1.0, RecordedRollout(), "use TopK with support: teacher or SampledReverseKL"),
        (
            TopK(ForwardKL(), 4, "student"),
            1.0,
            RecordedRollout(),
            "needs the whole distribution; use TopK with support: teacher",
        ),
        (TOP, 0.7, RecordedRollout(), "model.temperature is 0.7"),
        (TOP, 1.0, TeacherRollout(), "ServedTeacher scores responses and writes none"),
        (TOP, 1.0, MixedRollout([RecordedRollout(), TeacherRollout()], [0.5, 0.5]), "writes none"),
    ],
)
def test_what_a_server_does_not_serve(loss, temperature, rollout, says):
    teacher = ServedTeacher("http://localhost:1", "teacher")
    with pytest.raises(UserError, match=says):
        validate(Run(Distiller(teacher=teacher, rollout=rollout, loss=loss, temperature=temperature)))


@pytest.fixture
def words(server, tiny, rows, context, tmp_path):
    """Three steps against a served teacher; the teacher's own words stand first."""
    top = {"class_path": "TopK", "init_args": {"inner": {"class_path": "ForwardKL"}, "k": 8, "support": "teacher"}}
    served = {"class_path": "ServedTeacher", "init_args": {"base_url": server.url, "name": "teacher", "timeout": 30.0}}
    return [
        *("--model.teacher", json.dumps(served), "--model.student.name", tiny, "--model.loss", json.dumps(top)),
        *("--trainer.precision", "32-true", "--model.rollout.init_args.sampling.max_new_tokens", "6"),
        *("--model.rollout.init_args.dtype", "float32", "--model.optimizer", "torch.optim.SGD"),
        *("--model.optimizer.init_args.lr", "0.1", "--data.train", str(rows), "--data.context", str(context)),
        *("--model.eval_sampling.max_new_tokens", "2", "--data.batch_size", "4", "--trainer.max_steps", "3"),
        # The sums of a GPU have no fixed order, and two runs there differ by more than this.
        *("--trainer.default_root_dir", str(tmp_path / "runs"), "--trainer.accelerator", "cpu"),
    ]


def weights(run):
    return load_file(run / "student/model.safetensors")


def assert_same_student(run, other, **tolerance):
    for name, weight in weights(run).items():
        assert_close(weights(other)[name], weight, **tolerance)


def at_hand(folder):
    teacher = {"class_path": "FrozenTeacher", "init_args": {"model": {"name": folder, "dtype": "float32"}}}
    return "--model.teacher", json.dumps(teacher)


def test_the_sampled_tokens_teach_what_they_teach_with_the_teacher_at_hand(opcd, words, tiny_teacher, tmp_path):
    words = [*words, "--model.loss", "SampledReverseKL"]
    for teacher in (words[:2], at_hand(tiny_teacher)):
        code, output = opcd("fit", *teacher, *words[2:])
        assert code == 0, output
    assert_same_student(tmp_path / "runs/version_1", tmp_path / "runs/version_0", rtol=1e-4, atol=1e-5)


def test_a_run_whose_teacher_dies_goes_on_exactly(opcd, words, server, served, tiny_teacher, tmp_path, monkeypatch):
    """And it learns what the teacher at hand teaches, and the key is in nothing that it writes or says."""
    server.key = KEY
    monkeypatch.setenv("OPCD_TEACHER_KEY", KEY)
    code, output = opcd("fit", *words)
    assert code == 0, output
    assert opcd("fit", *at_hand(tiny_teacher), *words[2:])[0] == 0
    whole = tmp_path / "runs/version_0"
    assert_same_student(tmp_path / "runs/version_1", whole, rtol=1e-4, atol=1e-5)
    server.seen.clear()
    server.fault = completions(lambda handler, answer: die(handler, answer) if len(server.seen) > 18 else answer)
    broken = (*words, "--trainer.default_root_dir", tmp_path / "broken", "--ckpt_path", "last")
    code, said = opcd("fit", *broken, "--model.teacher.init_args.patience", 0.4)
    assert code == 2 and "model.teacher: http://127.0.0.1" in said and "resume with --ckpt_path last" in said, said
    saved = list((tmp_path / "broken").glob("version_0/checkpoints/step=*.ckpt"))
    assert [file.name for file in saved] == ["step=1.ckpt"]
    with serving(served) as other:  # elsewhere
        other.key = KEY
        code, again = opcd("fit", *broken, "--model.teacher.init_args.base_url", other.url)
    assert code == 0, again
    assert_same_student(whole, tmp_path / "broken/version_1", rtol=0, atol=0)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 10 and not any(KEY.encode() in file.read_bytes() for file in written)
    assert KEY not in output + said + again


def test_a_key_that_is_wrong_or_none(server, connected, monkeypatch):
    server.key = KEY
    server.fault = lambda handler, path, answer: answer
    with pytest.raises(UserError, match=r"HTTP 401 Unauthorized; the key comes from .* OPCD_TEACHER_KEY"):
        connected()
    monkeypatch.setenv("OPCD_TEACHER_KEY", f"{KEY}\nX-More: 1")
    with pytest.raises(UserError, match="OPCD_TEACHER_KEY is not a key") as raised:
        connected()
    assert KEY not in str(raised.value)
    monkeypatch.setenv("OPCD_TEACHER_KEY", KEY)
    server.fault = lambda handler, path, answer: handler.say(400, {"error": {"message": f"bad key {KEY}"}})
    with pytest.raises(UserError, match=r"HTTP 400 bad key \*\*\*"):
        connected()


def test_contexts_that_the_server_has_no_window_for(opcd, words, server):
    server.window = 120
    code, output = opcd("fit", *words, "--model.rollout.init_args.sampling.max_new_tokens", 100)
    assert code == 2 and "init_args.name: teacher takes 119 tokens" in output, output


def test_validation(opcd, words, rows):
    code, output = opcd("validate", *[{"--data.train": "--data.val"}.get(word, word) for word in words])
    assert code == 0 and "val/divergence" in output, output


def test_predictions_need_no_server():
    teacher = ServedTeacher("http://localhost:1", "teacher")
    validate(Run(Distiller(teacher=teacher, rollout=RecordedRollout(), loss=TOP), stage="predict"))


@pytest.mark.slow
@vllm_here
@pytest.mark.parametrize("cache", [(), CACHE], ids=["computes contexts", "caches contexts"])
def test_vllm_itself_teaches(opcd, rows, context, tmp_path, monkeypatch, cache):
    """Three steps against a real server give the weights that the model at hand gives, in float32."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = make_tiny(tmp_path / "model", hidden=128)  # vLLM's attention on a CPU wants heads of 32 numbers or more
    loss = "{class_path: TopK, init_args: {inner: {class_path: ReverseKL}, k: 16, support: teacher, tail: bucket}}"
    words = ["fit", "--model.student.name", folder, "--data.train", rows, "--data.context", context]
    words += ["--trainer.max_steps", 3, "--trainer.precision", "32-true", "--model.loss", loss]
    words += ["--model.rollout", "StudentRollout", "--model.rollout.sampling.max_new_tokens", 8]
    # Not Adam, which makes whole steps out of a gradient's rounding.
    words += ["--model.rollout.dtype", "float32", "--model.optimizer", "torch.optim.SGD"]
    words += ["--model.optimizer.lr", 0.1]
    at_hand = ("--model.teacher", "FrozenTeacher", "--model.teacher.model.name", folder)
    at_hand += ("--model.teacher.model.dtype", "float32", "--trainer.default_root_dir", tmp_path / "at_hand")
    code, said = opcd(*words, *at_hand)
    assert code == 0, said
    with vllm_serving(folder, "teacher", "--max-logprobs", 16, *cache) as address:
        served = ("--model.teacher", "ServedTeacher", "--model.teacher.base_url", address)
        served += ("--model.teacher.name", "teacher", "--trainer.default_root_dir", tmp_path / "served")
        code, said = opcd(*words, *served)
        assert code == 0, said
        assert bool(cached_tokens_of(address)) == bool(cache)
        code, said = opcd(*words, *served, "--model.loss.init_args.k", 17)
        assert code == 2 and "--max-logprobs 17" in said, said
    one, other = (load_file(tmp_path / name / "version_0/student/model.safetensors") for name in ("at_hand", "served"))
    start = load_file(folder / "model.safetensors")
    moved = [torch.cat([(end[name] - start[name]).flatten() for name in start]) for end in (one, other)]
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 1e-3
