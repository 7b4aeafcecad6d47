"""Responses from an engine: when it takes over the weights, the gap to the student, importance, and vLLM itself."""

import copy
import csv
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from benchmarks.tiny import make_tiny
from opcd.data import ContextQueryDataModule
from opcd.games import GameRollout
from opcd.losses import ReverseKL, SampledReverseKL
from opcd.models import ModelConfig
from opcd.modules import (
    ColocatedVLLM,
    Distiller,
    FrozenTeacher,
    MixedRollout,
    RecordedRollout,
    Sampling,
    Trajectories,
    VLLMRollout,
    VLLMServer,
)
from opcd.modules.lm.generation import generate
from opcd.modules.lm.hidden_states import HiddenStates, head_of, last_hidden
from opcd.modules.objective import rollout_log_ratios
from opcd.modules.rollouts.engine import Completion, Engine, vllm_settings
from opcd.modules.student import Student
from opcd.modules.validation import Run, validate
from opcd.runtime.errors import StepAbandoned, UserError
from opcd.runtime.extras import install_hint
from tests.helpers.ranks import SHARDED, run
from tests.helpers.teacher_server import Served, serving
from tests.helpers.training import gradients, relative_difference, trainer
from tests.helpers.vllm_server import ENVIRONMENT, VLLM, vllm_here, vllm_serving


class Plain(Engine):
    """An engine of transformers' generate, whose weights are `noise` times random numbers from the student's."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.renewed, self.model = noise, 0, None

    def sync_weights(self, student, dtype):
        self.renewed += 1
        self.model = copy.deepcopy(student.model).to(dtype)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for weight in self.model.parameters():
                weight.mul_(1 + self.noise * torch.randn_like(weight))

    def generate(self, prompts, settings, seeds):
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                sampling = Sampling(settings["max_tokens"], settings["temperature"])
                ids = torch.tensor(prompt)
                (y,) = generate(self.model, [ids], sampling, set(settings["stop_token_ids"]), 0)
            logits = self.model(torch.cat([ids, y])[None]).logits[0, len(prompt) - 1 : -1].double()
            log_p = logits.log_softmax(-1).gather(-1, y[:, None])[:, 0]
            answers.append(Completion(y.tolist(), log_p.tolist()))
        return answers


@pytest.fixture
def data(rows, context):
    return ContextQueryDataModule(train=str(rows), val=str(rows), context=str(context), shuffle=False)


def fit(tmp_path, data, rollout, tiny, steps=1, loss=None, **options):
    distiller = Distiller(ModelConfig(name=tiny), loss=loss or ReverseKL(), rollout=rollout)
    run = trainer(tmp_path, steps=steps, **options)
    run.fit(distiller, datamodule=data)
    return run


def test_the_gap_is_that_of_the_weights(tmp_path, data, tiny):
    sampling = Sampling(8)
    exact = fit(tmp_path, data, VLLMRollout(Plain(), sampling, dtype="float32"), tiny)
    assert float(exact.callback_metrics["train/rollout_logprob_gap"]) < 1e-5
    other = fit(tmp_path, data, VLLMRollout(Plain(noise=0.05), sampling, dtype="float32"), tiny)
    assert float(other.callback_metrics["train/rollout_logprob_gap"]) > 0.05


def test_the_gap_of_responses_that_are_known(tiny, batch):
    """Against float64 log-probabilities of whole rows, where one response of three came without."""
    student = Student.load(ModelConfig(name=tiny))
    part = batch.select([0, 1, 2])
    responses = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 10])]
    given = [torch.tensor([-1.0, -2.0, -3.0]), None, torch.tensor([-4.0, -5.0])]
    trajectories = Trajectories.of(part, responses, {2}, given)
    states = HiddenStates(last_hidden(student.model, trajectories.student_prompts, responses), head_of(student.model))
    log_ratios, known = rollout_log_ratios(states, trajectories)
    own = []
    for prompt, response in zip(trajectories.student_prompts, responses, strict=True):
        logits = student.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].double()
        own.append(logits.log_softmax(-1).gather(-1, response[:, None])[:, 0].detach())
    expected = torch.cat([own[0] - given[0], torch.zeros(1), own[2] - given[2]]).float()
    assert_close(log_ratios, expected, rtol=1e-4, atol=1e-4)
    assert known.tolist() == [True, True, True, False, True, True]
    assert not log_ratios.requires_grad
    assert rollout_log_ratios(states, Trajectories.of(part, responses, {2})) is None


def test_what_follows_the_end_has_no_log_probability(batch):
    cut = Trajectories.of(batch.select([0]), [torch.tensor([5, 2, 7])], {2}, [torch.tensor([-1.0, -2.0, -3.0])])
    assert cut.responses[0].tolist() == [5, 2]
    assert cut.log_probs[0].tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("limit", [0.9, 1e6])
def test_importance_weighs_every_token(monkeypatch, tmp_path, data, tiny, tiny_teacher, limit):
    """The gradient of a whole step against the definition, in float64."""
    rollout = VLLMRollout(Plain(noise=0.05), Sampling(6), dtype="float32", importance_clip=limit)
    seen = []
    monkeypatch.setattr(VLLMRollout, "generate", _keeping(VLLMRollout.generate, seen))
    teacher = FrozenTeacher(ModelConfig(name=tiny_teacher, dtype="float32"))
    distiller = Distiller(ModelConfig(name=tiny), teacher, rollout=rollout, reduction="token", micro_batch_tokens=200)
    found = gradients(tmp_path, data, distiller, precision="64-true", limit_val_batches=0)

    (trajectories,) = seen
    student, frozen = distiller.student.model, teacher.model.double()
    student.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row, y in enumerate(trajectories.responses):
        log_p, log_q = (
            model(torch.cat([prompts[row], y])[None]).logits[0, len(prompts[row]) - 1 : -1].log_softmax(-1)
            for model, prompts in ((student, trajectories.student_prompts), (frozen, trajectories.teacher_prompts))
        )
        own = log_p.gather(-1, y[:, None])[:, 0].detach()
        ratio = (own - trajectories.log_probs[row]).exp().clamp(max=limit)
        total = total + (ratio * (log_p.exp() * (log_p - log_q.detach())).sum(-1)).sum()
    (total / int(trajectories.lengths.sum())).backward()
    expected = {f"model.{name}": p.grad for name, p in student.named_parameters()}
    assert relative_difference(found, expected) < 1e-5  # the teacher has scored in float32


def _keeping(sample, seen):
    def run(*args):
        seen.append(sample(*args))
        return seen[-1]

    return run


def test_weights_are_taken_over_every_n_steps_and_for_validation(tmp_path, data, tiny):
    engine = Plain()
    fit(tmp_path, data, VLLMRollout(engine, Sampling(2), every_n_steps=2), tiny, steps=5, limit_val_batches=0)
    assert engine.renewed == 3  # steps 0, 2, 4
    engine = Plain()
    fit(tmp_path, data, VLLMRollout(engine, Sampling(2), every_n_steps=9), tiny, num_sanity_val_steps=0)
    assert engine.renewed == 2  # the step, and the validation after it


def test_settings_say_everything():
    sampling = Sampling(7, temperature=0.6, top_p=0.9, top_k=20, options={"min_p": 0.1})
    assert vllm_settings(sampling, {2, 5}) == {
        "max_tokens": 7,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "stop_token_ids": [2, 5],
        "logprobs": 0,
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VLLMRollout(Plain(), Sampling(options={"typical_p": 0.5})), "vLLM has no typical_p; it has min_p"),
        (lambda: VLLMRollout(Plain(), dtype="int8"), "dtype must be"),
        (lambda: VLLMRollout(Plain(), every_n_steps=0), "every_n_steps must be at least 1"),
        (lambda: VLLMRollout(Plain(), importance_clip=0.0), "importance_clip must be greater than 0"),
        (lambda: VLLMRollout(Plain(), Sampling(temperature=0.6), importance_clip=2.0), "set sampling.temperature to 1"),
        (
            lambda: MixedRollout([VLLMRollout(Plain(), importance_clip=2.0), RecordedRollout()], [0.5, 0.5]),
            "importance_clip has no effect inside it",
        ),
        (
            lambda: Distiller(loss=SampledReverseKL(), rollout=VLLMRollout(Plain(), every_n_steps=4)),
            "stale rollouts needs VLLMRollout's importance_clip",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rollout_within_another_is_looked_at_as_well(monkeypatch):
    monkeypatch.setattr("opcd.modules.rollouts.colocated_vllm.find_spec", lambda name: name)
    writes = VLLMRollout(ColocatedVLLM(), importance_clip=2.0)
    assert GameRollout(writes).importance_clip == 2.0
    mixed = MixedRollout([VLLMRollout(ColocatedVLLM()), RecordedRollout()], [0.5, 0.5])
    for rollout in (writes, GameRollout(writes), mixed, GameRollout(mixed)):
        distiller = Distiller(rollout=rollout)
        validate(Run(distiller))
        with pytest.raises(UserError, match="ColocatedVLLM is for one process"):
            validate(Run(distiller, ranks=2))
        with pytest.raises(UserError, match="ColocatedVLLM takes no sharded weights"):
            validate(Run(distiller, ranks=2, sharded=True))


class Sleeper:
    """What an engine is told, in order."""

    def __init__(self, told):
        self.told = told

    def sleep(self, level):
        self.told.append(f"sleep {level}")

    def wake_up(self, tags):
        self.told.append(f"wake {'+'.join(tags)}")

    def collective_rpc(self, name, kwargs):
        self.told.append(name)

    def reset_prefix_cache(self):
        self.told.append("reset")


@pytest.mark.case("GPU-B6")
def test_an_engine_wakes_in_parts_after_the_trainers_unused_memory_is_free(monkeypatch, tiny):
    told = []
    monkeypatch.setattr("opcd.modules.rollouts.colocated_vllm.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("free"))
    engine, student = ColocatedVLLM(), Student.load(ModelConfig(name=tiny))
    engine._llm, engine._sleeps = Sleeper(told), True
    engine.sync_weights(student, torch.float32)
    engine._wake("weights", "kv_cache")  # as `generate` does
    assert told == ["reload_weights", "reset"]  # it has not slept yet
    told.clear()
    for _ in range(2):
        engine.sleep()
        engine.sync_weights(student, torch.float32)
        engine._wake("weights", "kv_cache")
    once = ["sleep 1", "free", "wake weights", "reload_weights", "reset", "free", "wake kv_cache"]
    assert told == once * 2
    told.clear()
    engine.sleep()
    engine._wake("weights", "kv_cache")  # responses of old weights: every_n_steps
    assert told == ["sleep 1", "free", "wake weights+kv_cache"]


def test_a_server_that_is_not_vllms_is_one_message(tiny, monkeypatch, tmp_path):
    """Its weights cannot be renewed, and its answers have no token ids."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Served(tiny)) as server:
        engine = VLLMServer(server.url, "teacher", str(tmp_path / "weights"), timeout=20.0, patience=20.0)
        with pytest.raises(StepAbandoned, match=r"start the server with VLLM_SERVER_DEV_MODE=1.*--ckpt_path last"):
            engine.sync_weights(Student.load(ModelConfig(name=tiny)), torch.float32)
        assert load_file(tmp_path / "weights" / "model.safetensors").keys() >= {"lm_head.weight"}
        settings = vllm_settings(Sampling(4), {2}) | {
            "prompt_logprobs": 0
        }  # the test server's answer, which is replaced
        server.fault = lambda handler, path, answer: {"choices": [{"text": "It is."}]}
        with pytest.raises(StepAbandoned, match="not of vLLM's form"):
            engine.generate([[5, 6]], settings, [0])
        server.fault = lambda handler, path, answer: {
            "choices": [{"token_ids": [7, 2], "logprobs": {"token_logprobs": [-0.5]}}]
        }
        with pytest.raises(StepAbandoned, match="1 log-probabilities for 2 tokens"):
            engine.generate([[5, 6]], settings, [0])


@pytest.mark.case("E1")
def test_a_folder_of_the_users_is_refused_and_kept(tiny, monkeypatch, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "model.safetensors").write_text("mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    student = Student.load(ModelConfig(name=tiny))
    for place in ("~", tmp_path / "work"):
        engine = VLLMServer("http://127.0.0.1:9", "student", str(place))
        with pytest.raises(UserError, match=r"weights of VLLMServer: .* holds files that opcd did not write there"):
            engine.connect()
        with pytest.raises(UserError, match="did not write there"):
            engine.sync_weights(student, torch.float32)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["work", "work/model.safetensors"]
    assert (tmp_path / "work" / "model.safetensors").read_text() == "mine"


@pytest.mark.case("E1")
def test_weights_take_the_place_of_former_ones_only(tiny, monkeypatch, tmp_path):
    engine = VLLMServer("http://127.0.0.1:9", "student", str(tmp_path / "weights"))
    monkeypatch.setattr(engine, "_develop", lambda *args: {"success": True})
    student = Student.load(ModelConfig(name=tiny))
    engine.sync_weights(student, torch.float32)
    engine.sync_weights(student, torch.bfloat16)
    assert load_file(tmp_path / "weights" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    (tmp_path / "weights" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes"):
        engine.sync_weights(student, torch.float32)
    assert len(list((tmp_path / "weights").iterdir())) == 3


def test_a_server_that_cannot_write_is_told_before_a_model_loads(opcd, tiny, rows, context, monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("opcd.modules.rollouts.vllm_server.START", 0.1)
    monkeypatch.setattr("opcd.modules.distiller.Student.load", None)
    with serving(Served(tiny)) as server:
        words = ("fit", "--model.student.name", tiny, "--data.train", rows, "--trainer.default_root_dir", tmp_path)
        words += ("--trainer.max_steps", 1, "--data.context", context)
        words += ("--model.rollout", "VLLMRollout", "--model.rollout.init_args.engine", "VLLMServer")
        words += ("--model.rollout.init_args.engine.weights", tmp_path / "weights")
        words += ("--model.rollout.init_args.engine.base_url", server.url, "--model.rollout.init_args.engine.name")
        code, said = opcd(*words, "teacher")
        assert code == 2 and "model.rollout's engine: " in said and "VLLM_SERVER_DEV_MODE=1" in said, said
        code, said = opcd(*words, "another")
        assert code == 2 and "serves no model another, but teacher" in said, said
        server.fault = lambda handler, path, answer: (
            handler.say(200, {"success": True}) if path == "/reset_prefix_cache" else answer
        )
        server.window = 100
        code, said = opcd(*words, "teacher", "--model.rollout.init_args.sampling.max_new_tokens", 90)
        assert code == 2 and "model.rollout: VLLMServer takes 100 tokens" in said, said
    code, said = opcd(*words, "teacher")
    assert code == 2 and "/v1/models: ConnectError" in said, said
    assert not list(tmp_path.glob("version_*"))


def test_vllm_that_is_not_installed_is_one_message(opcd, tiny, rows, tmp_path):
    code, said = opcd(
        *("fit", "--model.student.name", tiny, "--data.train", rows, "--trainer.default_root_dir", tmp_path),
        *("--model.rollout", "VLLMRollout", "--model.rollout.init_args.engine", "ColocatedVLLM"),
    )
    assert code == 2
    assert f"ColocatedVLLM needs vLLM: {install_hint('vllm')}" in said
    assert not list(tmp_path.glob("version_*"))


def words(folder, rows, context, *more):
    """Three steps with a large rate, in float32: the gap is then that of rounding, where the weights are the same."""
    return [
        *("fit", "--model.student.name", folder, "--data.train", rows, "--data.context", context),
        *("--trainer.max_steps", 3, "--trainer.default_root_dir", folder.parent, "--trainer.precision", "32-true"),
        *("--model.optimizer", "AdamW", "--model.optimizer.lr", 1e-2, "--model.rollout", "VLLMRollout"),
        *("--model.rollout.dtype", "float32", "--model.rollout.sampling.max_new_tokens", 8, *more),
    ]


def gaps(folder):
    with (folder.parent / "version_0" / "metrics.csv").open() as stream:
        return [float(step["train/rollout_logprob_gap"]) for step in csv.DictReader(stream)]


@pytest.fixture
def wide(tmp_path):
    """vLLM's attention on a CPU wants heads of 32 numbers or more."""
    return make_tiny(tmp_path / "tiny", hidden=128)


@pytest.mark.slow
@vllm_here
@pytest.mark.parametrize("adapter", [False, True])
def test_vllm_in_this_process(wide, rows, context, adapter):
    engine = ("--model.rollout.engine", "ColocatedVLLM", "--model.rollout.engine.max_model_len", 256)
    options = ("--model.rollout.engine.options", '{"enforce_eager": true}')
    lora = ("--model.adapter.rank", 4, "--model.student.dtype", "float32") if adapter else ()
    command = [VLLM, "-m", "opcd", *words(wide, rows, context, *engine, *options, *lora)]
    done = subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(gaps(wide)) == 3 and max(gaps(wide)) < 1e-3, gaps(wide)


@pytest.mark.slow
@vllm_here
@pytest.mark.parametrize("ranks", [(), SHARDED])
def test_a_vllm_server(wide, rows, context, tmp_path, ranks):
    more = ("--model.rollout.engine.name", "student", "--model.rollout.engine.weights", tmp_path / "weights")
    with vllm_serving(wide, "student", "--generation-config", "vllm") as address:
        engine = ("--model.rollout.engine", "VLLMServer", "--model.rollout.engine.base_url", address)
        run(*words(wide, rows, context, *engine, *more, *ranks, "--data.batch_size", 4))
    assert len(gaps(wide)) == 3 and max(gaps(wide)) < 1e-3, gaps(wide)
