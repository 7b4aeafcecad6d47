"""A parsed config of `opcd fit` as a `Setting`."""

from typing import Any

import torch

from opcd.accel.cpu.heap import GLIBC
from opcd.accel.precision import fast_dtype
from opcd.callbacks import AnswerSamples
from opcd.modules import Distiller, RecordedTeacher
from opcd.modules.distributed.fsdp_strategy import SHARDED, FullyShard, chosen
from opcd.modules.validation import Run, validate
from opcd.planning.plan_lengths import Lengths
from opcd.planning.roles import student_of, teacher_of, writers_of
from opcd.planning.setting import UNPACKED, Setting
from opcd.runtime.errors import UserError

SHORT = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}
"""Lightning's other names."""
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "bf16-mixed": (torch.bfloat16, None),
    "32-true": (None, None),
    "bf16-true": (None, torch.bfloat16),
    "64-true": (None, torch.float64),
}
"""Autocast's type, and that which all weights of the student get."""
SIDE = 1024
"""Rows and columns of the matrix that an optimizer is tried on."""


def read_setting(trainer: Any, distiller: Distiller, batch: int, lengths: Lengths, process: int) -> Setting:
    """What the config says, on this machine or, with accelerator gpu, on one with GPUs.

    Args:
        trainer: the config's part, not instantiated: the devices may be elsewhere.
        distiller: instantiated, without weights.
        batch: rows of a step on one rank.
        lengths: of the data.
        process: bytes of a process before it loads a model.

    Raises:
        UserError: something that `opcd fit` refuses, or that is not known here.
    """
    gpu = on_gpu(trainer)
    fast = torch.bfloat16 if gpu else fast_dtype("cpu")
    autocast, forced = _precision(trainer.precision, fast)
    ranks, sharded = _ranks(trainer, gpu)
    student = student_of(distiller, forced, fast)
    optimizer = _optimizer(distiller, torch.float32 if distiller.adapter else student.dtype)
    _check(distiller, ranks, sharded)
    teachers = list(distiller.teacher.parts.values())
    scoring = [teacher.config or distiller.student_config for teacher in teachers]
    prefixes = [teacher.prefix for teacher in teachers]
    return Setting(
        student,
        lora=distiller.adapter,
        batch=batch,
        query=lengths.query,
        context=lengths.context,
        contexts=lengths.contexts,
        response=lengths.response,
        answers=_sample_answers(trainer),
        answer=distiller.answer.max_new_tokens,
        micro_batch_tokens=distiller.micro_batch_tokens,
        multi_turn=distiller.rollout.multi_turn,
        checkpointing=distiller.gradient_checkpointing,
        shared_prefix=prefixes[0].mode != "never",
        prefix_bytes=sum(prefix.memory_mib for prefix in prefixes) * 2**20,
        masks=gpu and any(model.attention != "flex_attention" for model in scoring),
        autocast=autocast,
        gpu=gpu,
        fast=fast,
        packs=not gpu and torch.backends.mkldnn.is_available(),
        keeps_freed=not gpu and GLIBC,
        ranks=ranks,
        sharded=sharded,
        process=0 if gpu else process,
        state_bytes=_kept(optimizer),
        unpacked=_unpacked(optimizer, gpu),
        fused=bool(optimizer.defaults.get("fused")),
        **teacher_of(distiller, student, fast, gpu, sharded, ranks),
        **writers_of(distiller.rollout, recorded=any(isinstance(t, RecordedTeacher) for t in teachers), fast=fast),
    )


def on_gpu(trainer: Any) -> bool:
    """Whether the accelerator is a GPU; auto takes one where there is one. UserError for neither GPU nor CPU."""
    name = str(trainer.accelerator)
    if name not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"trainer.accelerator: there is no plan for {name}; use cpu or gpu")
    return name in ("gpu", "cuda") or (name == "auto" and torch.cuda.is_available())


def _check(distiller: Distiller, ranks: int, sharded: bool) -> None:
    """Refuse what `opcd fit` refuses, as far as memory depends on it, and attention that is not counted."""
    validate(Run(distiller, None, "fit", ranks, sharded, connect=False))
    models = [distiller.student_config, *(part.config for part in distiller.teacher.parts.values())]
    if any(model is not None and model.attention == "eager" for model in models):
        raise UserError("attention: there is no plan for eager, which has a score for every pair of tokens; use sdpa")


def _precision(configured: Any, fast: torch.dtype) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Of a precision that is left open, that of the hardware."""
    if configured is None:
        configured = "bf16-mixed" if fast == torch.bfloat16 else "32-true"
    name = SHORT.get(str(configured), str(configured))
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision: there is no plan for {name}; use one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def _ranks(trainer: Any, gpu: bool) -> tuple[int, bool]:
    """How many there are, and whether the student lies in parts."""
    devices = trainer.devices
    if str(devices) in ("auto", "-1"):
        number = max(1, torch.cuda.device_count()) if gpu else 1
    else:
        number = len(devices) if isinstance(devices, list) else int(devices)
    strategy = chosen(trainer.strategy)
    name = str(getattr(strategy, "class_path", strategy)).rpartition(".")[2].lower()
    sharded = name in (SHARDED.lower(), FullyShard.__name__.lower())
    if not sharded and name not in ("auto", "singledevicestrategy") and not name.startswith("ddp"):
        raise UserError(f"trainer.strategy: there is no plan for {name}; use ddp, or {SHARDED} (FSDP2)")
    return number * int(trainer.num_nodes), sharded


def _sample_answers(trainer: Any) -> int:
    """Rows of the callback that every training has, or of the config's own."""
    for callback in trainer.callbacks or []:
        if str(getattr(callback, "class_path", "")).endswith(f".{AnswerSamples.__name__}"):
            return int(callback.init_args.queries)
    return AnswerSamples().queries


def _optimizer(distiller: Distiller, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The optimizer after a step on one matrix."""
    matrix = torch.nn.Parameter(torch.ones(SIDE, SIDE, dtype=dtype))
    matrix.grad = torch.ones_like(matrix)
    try:
        optimizer = distiller.optimizer([matrix])
        optimizer.step()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"model.optimizer: its step fails on a matrix: {error}") from error
    return optimizer


def _kept(optimizer: torch.optim.Optimizer) -> float:
    """Bytes that it keeps of each number of that matrix."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor)) / SIDE**2


def _unpacked(optimizer: torch.optim.Optimizer, gpu: bool) -> float:
    """Bytes a number that its step takes beside its states; known of bitsandbytes' 8-bit ones on a CPU."""
    packed = type(optimizer).__module__.startswith("bitsandbytes") and _kept(optimizer) < 4
    return UNPACKED if packed and not gpu else 0.0
