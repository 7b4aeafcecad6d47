"""The shared prefix against the full pass, on a small random model of each family; families that cannot fall back."""

import weakref

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opcd.accel import Accelerator
from opcd.accel.cpu import attention as cpu_attention
from opcd.accel.cpu.accelerator import CPUAccelerator
from opcd.accel.packed_attention import Packed, Scoring
from opcd.models import ModelConfig
from opcd.modules import MovingAverageTeacher, SelfTeacher
from opcd.modules.lm.generation import Sampling, generate
from opcd.modules.prefix import packing
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.student import Student
from opcd.modules.trajectories import Trajectories
from opcd.planning.sizes import MASK
from opcd.runtime.errors import UserError
from tests.helpers.families import make
from tests.helpers.hardware import needs_gpu
from tests.helpers.small_models import FAMILIES, WITHOUT, Teaches, ids, packed_trajectories


@pytest.fixture
def mixed():
    """Rows of several contexts."""
    return packed_trajectories()


@pytest.mark.parametrize("max_tokens", [10, 40, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shared_prefix_changes_nothing(family, mixed, max_tokens) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    full = Teaches(model, "never").score(mixed, 4096)
    teacher = Teaches(model)
    for _ in range(2):  # the second time from the kept keys and values
        fast = teacher.score(mixed, max_tokens)
        assert_close(fast.hidden, full.hidden, rtol=1e-5, atol=1e-5)
    assert teacher.prefix._agrees is True
    assert len(teacher.prefix._entries) == 3  # the row that leaves early has a prefix of its own by the second time


@pytest.fixture
def elsewhere(monkeypatch):
    """As on a GPU: no code of the CPU's own."""
    monkeypatch.setattr(CPUAccelerator, "attend_packed", Accelerator.attend_packed)


@pytest.mark.case("GPU-S2")
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    # Eager attention computes its softmax in float32, in the context's own pass too.
    [("sdpa", torch.float64, 1e-10), ("sdpa", torch.float32, 1e-5), ("eager", torch.float32, 1e-5)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_parts_are_the_full_pass(family, name, dtype, tolerance, mixed, elsewhere, monkeypatch) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype)
    full = Teaches(model, "never").score(mixed, 4096)
    model.set_attn_implementation(name)
    monkeypatch.setattr(packing, "packed_masks", None)  # none is made
    teacher = Teaches(model)
    assert_close(teacher.score(mixed, 4096).hidden, full.hidden, rtol=tolerance, atol=tolerance)
    assert teacher.prefix._agrees is True


@needs_gpu
@pytest.mark.case("GPU-S2")
@pytest.mark.parametrize("family", FAMILIES)
def test_two_parts_on_a_gpu(family) -> None:
    """In float32, and in bfloat16 (the kernel) as near to float64 as whole rows are."""
    torch.manual_seed(0)
    model, mixed = FAMILIES[family](), packed_trajectories()
    exact = Teaches(model.double(), "never").score(mixed, 4096).hidden
    one = Teaches(model.float().cuda(), "always").score(mixed, 4096).hidden
    assert_close(one.double().cpu(), exact, rtol=1e-3, atol=1e-3)
    model.bfloat16()
    exact = Teaches(model.double(), "never").score(mixed, 4096).hidden  # of rounded weights
    full, fast = (Teaches(model.bfloat16(), mode).score(mixed, 4096).hidden for mode in ("never", "always"))
    assert (fast.double() - exact).norm() < 2 * (full.double() - exact).norm()


@pytest.mark.case("GPU-S2", "GPU-B5")
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_packed_rows_beside_flash_attention(name, mixed, elsewhere, monkeypatch) -> None:
    """The full pass and the context's own are FlashAttention's, here SDPA under its name."""
    torch.manual_seed(0)
    model = FAMILIES["qwen3"]()
    full = Teaches(model, "never").score(mixed, 4096)
    monkeypatch.setitem(AttentionInterface._global_mapping, name, sdpa_attention_forward)
    monkeypatch.setattr(model.config, "_attn_implementation", name)
    teacher = Teaches(model)
    assert_close(teacher.score(mixed, 4096).hidden, full.hidden, rtol=1e-5, atol=1e-5)
    assert teacher.prefix._agrees is True


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.case("D13", "W1")
def test_a_mask_for_models_that_keep_their_attention(family, name, mixed, monkeypatch) -> None:
    """For eager attention it is added: a bool mask would be added to the scores as 0 and 1."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    full = Teaches(model, "never").score(mixed, 4096)
    model.set_attn_implementation(name)
    monkeypatch.setattr(CPUAccelerator, "packs_rows", lambda *arguments: False)
    for mode in ("always", "auto"):
        teacher = Teaches(model, mode)
        assert_close(teacher.score(mixed, 4096).hidden, full.hidden, rtol=1e-5, atol=1e-5)
        assert teacher.prefix._agrees is True


@pytest.mark.case("D13", "W1")
def test_an_added_mask_in_low_precision(mixed, monkeypatch) -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"]().bfloat16()
    model.set_attn_implementation("eager")
    monkeypatch.setattr(CPUAccelerator, "packs_rows", lambda *arguments: False)
    full, fast = (Teaches(model, mode).score(mixed, 4096).hidden.float() for mode in ("never", "always"))
    assert (fast - full).norm() < 0.02 * full.norm()


@pytest.mark.case("GPU-S2")
@pytest.mark.parametrize("family", FAMILIES)
def test_two_parts_in_low_precision(family, mixed, elsewhere) -> None:
    """As near to float64 as whole rows are."""
    torch.manual_seed(0)
    model = FAMILIES[family]().bfloat16()
    full, fast = (Teaches(model, mode).score(mixed, 4096).hidden.double() for mode in ("never", "always"))
    exact = Teaches(model.double(), "never").score(mixed, 4096).hidden
    assert (fast - exact).norm() < 1.3 * (full - exact).norm()


@pytest.mark.case("B11")
@pytest.mark.parametrize("family", ["Gemma2", "GptOss", "DeepseekV2", "DeepseekV3"])
def test_families_of_another_attention_share(family, mixed, elsewhere, monkeypatch) -> None:
    """Scores that are capped, a sink; keys and values that are kept compressed need a mask."""
    torch.manual_seed(0)
    model = make(family)
    if not model._supports_sdpa:
        model.set_attn_implementation("eager")
    if "Deepseek" not in family:
        monkeypatch.setattr(packing, "packed_masks", None)
    teacher = Teaches(model)
    assert_close(
        teacher.score(mixed, 4096).hidden, Teaches(model, "never").score(mixed, 4096).hidden, rtol=1e-4, atol=1e-4
    )
    assert teacher.prefix._agrees is True


@pytest.mark.case("GPU-B5")
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_compressed_states_without_a_mask_fall_back_before_any_pass(name, mixed, monkeypatch) -> None:
    """FlashAttention would take the mask for padding, and read beyond its keys."""
    model = make("DeepseekV3")
    cannot_share(model, name, mixed, monkeypatch)


@pytest.mark.case("GPU-B5")
@pytest.mark.parametrize("name", ["flex_attention", "kernels-community/flash-attn"])
def test_an_unknown_attention_falls_back_before_any_pass(name, mixed, monkeypatch) -> None:
    """It may compute something else."""
    cannot_share(FAMILIES["llama"](), name, mixed, monkeypatch)


def cannot_share(model, name, mixed, monkeypatch) -> None:
    """The reason is told, and no token is read."""
    rows = list(zip(mixed.teacher_prompts, mixed.responses, strict=True))
    monkeypatch.setattr(model.config, "_attn_implementation", name)
    monkeypatch.setattr(model.model, "forward", None)
    with pytest.warns(UserWarning, match=f"attention {name} takes no mask of packed rows; set attention to sdpa"):
        assert PrefixCache("auto").score(model, mixed.teacher_prefixes, rows, 4096) == {}
    with pytest.raises(UserError, match=r"model\.shared_prefix: always does not work for"):
        PrefixCache("always").score(model, mixed.teacher_prefixes, rows, 4096)
    with pytest.raises(ValueError, match="takes no mask of packed rows"):
        packing.packed_masks(model, 4, [3, 2])


class Bytes(TorchDispatchMode):
    """Counts what tensors hold while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.living, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor):
            return result
        storage = result.untyped_storage()
        if storage.data_ptr() not in self.living:
            self.living.add(storage.data_ptr())
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(result, self.gone, storage.data_ptr(), storage.nbytes())
        return result

    def gone(self, place, size) -> None:
        self.living.discard(place)
        self.now -= size


@pytest.mark.case("W3")
@pytest.mark.parametrize(
    ("family", "kinds"), [("llama", 1), ("mistral, sliding window", 1), ("gemma3, both kinds of layer", 2)]
)
def test_what_it_takes_to_make_a_mask(family, kinds) -> None:
    """As the plan counts it: a comparison of all pairs is a byte each."""
    model = FAMILIES[family]()
    with Bytes() as counted:
        masks = packing.packed_masks(model, 300, [100] * 4)
    assert len(masks) == kinds
    assert counted.most < (MASK + kinds - 1 + 0.5) * 400 * 700


@pytest.mark.parametrize("name", ["PREFIX_QUERIES", "PREFIX_KEYS", "PACKED_QUERIES", "SCORES"])
@pytest.mark.parametrize("family", ["llama", "mistral, sliding window"])
def test_scores_that_come_in_several_parts(family, name, mixed, monkeypatch) -> None:
    monkeypatch.setattr(cpu_attention, name, 7)
    test_the_shared_prefix_changes_nothing(family, mixed, 4096)


def test_the_fast_path_is_taken(mixed, monkeypatch) -> None:
    """Rows that share a context never run it again."""
    teacher = Teaches(FAMILIES["llama"](), "always")
    teacher.score(mixed, 4096)
    tokens = []
    monkeypatch.setattr(
        teacher.model.model, "forward", lambda *, input_ids, f=teacher.model.model.forward, **k: tokens.append(
            input_ids.numel()
        ) or f(input_ids=input_ids, **k)
    )  # fmt: skip
    teacher.score(mixed, 4096)
    whole = sum(len(p) + len(r) for p, r in zip(mixed.teacher_prompts, mixed.responses, strict=True))
    assert sum(tokens) < whole / 2


@pytest.mark.parametrize("family", WITHOUT)
def test_families_without_keys_and_values_fall_back_with_one_message(family, mixed) -> None:
    torch.manual_seed(0)
    model = WITHOUT[family]()
    full = Teaches(model, "never").score(mixed, 4096)
    teacher = Teaches(model)
    with pytest.warns(
        UserWarning, match="it has recurrent layers, which keep a state and no keys and values"
    ) as caught:
        for _ in range(2):
            assert_close(teacher.score(mixed, 4096).hidden, full.hidden, rtol=1e-5, atol=1e-5)
    assert len([w for w in caught if "shared prefix" in str(w.message)]) == 1


def test_a_wrong_mask_is_noticed(mixed, monkeypatch) -> None:
    monkeypatch.setattr(cpu_attention, "_unseen", lambda first, last, _: torch.ones(last - first, last).triu(2) > 0)
    teacher = Teaches(FAMILIES["llama"]())
    full = Teaches(teacher.model, "never").score(mixed, 4096)
    with pytest.warns(UserWarning, match="hidden states differ by"):
        assert_close(teacher.score(mixed, 4096).hidden, full.hidden)


def test_the_least_used_prefix_goes_first(mixed) -> None:
    teacher = Teaches(FAMILIES["llama"](), "always")
    teacher.score(mixed, 4096)
    (one, entry), (two, _) = teacher.prefix._entries.items()
    teacher.prefix.memory_mib = entry.bytes / 2**20
    teacher.score(mixed.select([0, 2]), 4096)
    assert list(teacher.prefix._entries) == [two, one]  # nothing new: nothing goes
    shorter = mixed.select([7, 7])
    teacher.score(shorter, 4096)
    assert one not in teacher.prefix._entries or two not in teacher.prefix._entries
    assert sum(e.bytes for e in teacher.prefix._entries.values()) <= entry.bytes


@pytest.mark.parametrize("make", [MovingAverageTeacher, SelfTeacher])
def test_changed_weights_compute_the_context_anew(make, tiny, batch) -> None:
    config = ModelConfig(name=tiny)
    student, teacher = Student.load(config), make()
    teacher.prefix = PrefixCache("always")
    teacher.setup(student, config, torch.device("cpu"))
    teacher.prefix.use(student.version)
    trajectories = Trajectories.of(batch, ids(*[4] * len(batch)), {2})
    teacher.score(trajectories, 4096)
    assert teacher.prefix._entries
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.1)
    teacher.on_student_step(student)
    teacher.prefix.use(student.version)
    fast = teacher.score(trajectories, 4096).hidden
    teacher.prefix = PrefixCache("never")
    assert_close(fast, teacher.score(trajectories, 4096).hidden, rtol=1e-4, atol=1e-4)


def test_prefixes_of_real_prompts_begin_them(batch) -> None:
    """The packaged tokenizer, the chat template and a context: every prompt begins with the prefix, which holds it."""
    for prompt, prefix in zip(batch.teacher_prompts, batch.teacher_prefixes, strict=True):
        assert torch.equal(prompt[: len(prefix)], prefix)
        assert len(prefix) >= 16


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_behind_shared_prefixes(family) -> None:
    """Greedy tokens of prompts of different lengths and two contexts: with the kept keys and values as without."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    one, two = ids(30, 21, seed=1)
    contexts = [one, two, one, one]
    prompts = [torch.cat(pair) for pair in zip(contexts, ids(3, 9, 1, 14, seed=2), strict=True)]
    if "sliding" in family or "both kinds" in family:
        with torch.no_grad():
            assert PrefixCache("always").encoded(model, contexts, prompts) is None  # padding counts as distance
        contexts, prompts = [one] * 2, [torch.cat([one, query]) for query in ids(5, 5, seed=2)]
    greedy = Sampling(12, temperature=0.0)
    expected = [row.tolist() for row in generate(model, prompts, greedy, {96}, 0)]
    prefix = PrefixCache()
    for _ in range(2):
        with torch.no_grad():
            encoded = prefix.encoded(model, contexts, prompts)
        assert [len(entry.ids) for entry in encoded] == [len(context) for context in contexts]
        assert [row.tolist() for row in generate(model, prompts, greedy, {96}, 0, encoded)] == expected


def test_prompts_that_share_nothing_are_generated_whole() -> None:
    model = FAMILIES["llama"]().eval()
    contexts = ids(30, 30, seed=1)
    prompts = [torch.cat([context, query]) for context, query in zip(contexts, ids(3, 9), strict=True)]
    with torch.no_grad():
        assert PrefixCache("always").encoded(model, contexts, prompts) is None
        assert PrefixCache("never").encoded(model, contexts[:1] * 2, prompts[:1] * 2) is None


def attend(query, key, value):
    """One query behind a prefix of all keys but its own."""
    before, own = zip(*((x[0, :, :-1], x[0, :, -1:]) for x in (key, value)), strict=True)
    result = cpu_attention.attend_packed(query[0], own, before, Packed([1]), Scoring(query.shape[-1] ** -0.5))
    return result.transpose(0, 1)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e3, -1e3])
def test_a_score_far_above_those_looked_at(factor, dtype) -> None:
    """One that is not among those looked at."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, rows, 16, generator=generator, dtype=dtype) for rows in (1, 41, 41))
    key[:, :, 5] = factor * query[:, :, 0]
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (query, key, value)))
    assert_close(attend(query, key, value).double(), exact, rtol=2**-6, atol=2**-6)


def test_large_scores_lose_nothing_in_low_precision() -> None:
    """Keys with a bias, as Qwen2's: all scores are large, and only their differences count."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, rows, 16, generator=generator) for rows in (1, 41, 41))
    low = [x.bfloat16() for x in (4 * query, key + 20, value)]
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in low))
    ours = attend(*low)
    torchs = torch.nn.functional.scaled_dot_product_attention(*low)
    assert (ours - exact).norm() < 2 * (torchs - exact).norm()
