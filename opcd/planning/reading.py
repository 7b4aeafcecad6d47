"""The `Setting` of a parsed config of `opcd fit`."""

import platform
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from opcd.accel.precision import fast_dtype
from opcd.data.contexts import read_contexts
from opcd.models import ModelConfig
from opcd.modules import Distiller, Lora, ModelTeacher, Student
from opcd.modules.teachers.anchored_teachers import with_anchors
from opcd.modules.validation import Run, check_data, validate
from opcd.planning.model_shapes import Model, build, kept_by_autograd, measured
from opcd.planning.sizes import Setting
from opcd.runtime.errors import UserError

PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    **dict.fromkeys(("bf16-mixed", "bf16"), (torch.bfloat16, None)),
    **dict.fromkeys(("32-true", "32"), (None, None)),
    "bf16-true": (None, torch.bfloat16),
    **dict.fromkeys(("64-true", "64"), (None, torch.float64)),
}
"""trainer.precision -> the type of autocast, and the type forced on the student's weights."""
SIDE = 1024
"""Rows and columns of the matrix on which an optimizer is tried."""


def read_setting(trainer: Any, made: Any, query: int | None, context: int | None, process: int) -> Setting:
    """Read the setting of a run from its config.

    Args:
        trainer: the config's `trainer`, not instantiated: its devices may be on another machine.
        made: `model` and `data`, instantiated without weights.
        query, context: tokens of the longest prompt, and tokens that its context adds; None reads the rows.
        process: bytes of a process before it loads a model.

    Raises:
        UserError: `opcd fit` refuses the config, or the plan does not support it.
    """
    model: Distiller = made.model
    gpu, run = _on_gpu(trainer), Run.configured(model, trainer, None, connect=False)
    ranks, sharded = run.ranks, run.sharded
    validate(run)
    lengths = _lengths(made, query, context, run)
    fast = torch.bfloat16 if gpu else fast_dtype("cpu")
    autocast, forced = _precision(trainer.precision, fast)
    frozen = forced or _dtype(model.student_config, fast)
    dtype = frozen if model.adapter else forced or _dtype(model.student_config, torch.float32)
    optimizer, state_bytes = optimizer_of(model, torch.float32 if model.adapter else dtype)
    built = build(model.student_config, "model.student", dtype, model.adapter)
    student = measured(built, autocast, model.student_config.quantization)
    prefixes = [part.prefix for part in model.teacher.parts.values() if part.prefix.mode != "never"]
    if made.data.anchors is not None:
        model.teacher = with_anchors(model.teacher, model.student_config, model.adapter is not None)
    scorer, teacher_bytes, of_teachers = teachers_of(model, built, student, fast, sharded, ranks)
    writers, rollout_dtype, of_rollout = writers_of(model, fast if student.quantization == "none" else dtype)
    learning, of_pass = _with_activations(built, autocast, student.quantization)
    return Setting(
        learning,
        learning if scorer is student else scorer,
        teacher_bytes=teacher_bytes,
        writers=writers,
        rollout_dtype=rollout_dtype,
        adapted=lambda: _with_activations(build(model.student_config, "model.student", frozen, Lora()), autocast)[0],
        state_bytes=state_bytes,
        fused=bool(optimizer.defaults.get("fused")),
        batch=made.data.rows_on_each(ranks),
        at_a_time=next((part.rows_at_a_time for part in model.rollout.parts if part.rows_at_a_time), None),
        micro_batch_tokens=model.micro_batch_tokens,
        multi_turn=model.rollout.multi_turn,
        checkpointing=model.gradient_checkpointing,
        prefix_bytes=sum(prefix.memory_mib for prefix in prefixes) * 2**20,
        gpu=gpu,
        heap=not gpu and platform.libc_ver()[0] == "glibc",
        ranks=ranks,
        sharded=sharded,
        process=0 if gpu else process,
        not_counted=(*of_teachers, *of_rollout, *of_pass),
        **lengths,
    )


def _lengths(made: Any, query: int | None, context: int | None, run: Run) -> dict[str, int]:
    """Tokens of the longest prompts and responses, and the number of contexts. Reads no row if both are given."""
    data, model = made.data, made.model
    try:
        if query is not None and context is not None:
            return {"query": query, "context": context, "response": model.rollout.max_response_tokens(data, "train")}
        data.setup("fit")
        response = model.rollout.max_response_tokens(data, "train")
        check_data(run, data)
    except RuntimeError as error:
        name = type(model.rollout).__name__
        raise UserError(
            f"model.rollout: {name} reads the rows of data.train; give only one of --query_tokens and --context_tokens"
        ) from error
    except UserError as error:
        raise UserError(f"{error} (no row is read where --query_tokens and --context_tokens are given)") from error
    longest = data.longest_student_prompt("train")
    taught = max(data.longest_teacher_prompt("train", name) for name in model.teacher.parts)
    own = {example.context for example in data.examples("train")} - {None}
    return {
        "query": longest if query is None else query,
        "context": max(0, taught - longest) if context is None else context,
        "response": response,
        "contexts": len(own) + (len(read_contexts(data.context)) if data.context else 0),
    }


def _on_gpu(trainer: Any) -> bool:
    """Whether a trainer's config asks for a GPU; auto takes one if there is one. UserError for other devices."""
    name = str(trainer.accelerator)
    if name not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"trainer.accelerator: --plan does not support {name}; use cpu or gpu")
    return name in ("gpu", "cuda") or (name == "auto" and torch.cuda.is_available())


def _precision(configured: Any, fast: torch.dtype) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The entry of `PRECISIONS`; by default that of the hardware."""
    name = str(configured or ("bf16-mixed" if fast == torch.bfloat16 else "32-true"))
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision: --plan does not support {name}; use one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def _dtype(config: ModelConfig, auto: torch.dtype) -> torch.dtype:
    return auto if config.dtype == "auto" else getattr(torch, config.dtype)


def optimizer_of(model: Distiller, dtype: torch.dtype) -> tuple[torch.optim.Optimizer, float]:
    """The optimizer, and the bytes of its states for a number of a matrix, after one step."""
    matrix = torch.nn.Parameter(torch.ones(SIDE, SIDE, dtype=dtype))
    matrix.grad = torch.ones_like(matrix)
    try:
        optimizer = model.optimizer([matrix])
        optimizer.step()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"model.optimizer: its step fails on a matrix: {error}") from error
    states = [value for state in optimizer.state.values() for value in state.values()]
    return optimizer, sum(value.nbytes for value in states if isinstance(value, torch.Tensor)) / SIDE**2


def _with_activations(
    built: PreTrainedModel, autocast: torch.dtype | None, quantization: str = "none"
) -> tuple[Model, list[str]]:
    """The student with the bytes of its activations, and a line if they are unknown."""
    student = measured(built, autocast, quantization)
    try:
        kept, casts = kept_by_autograd(built, autocast)
    except Exception as error:
        why = str(error).strip().splitlines()[0]
        return student, [f"activations: the student's forward pass needs its weights ({why})"]
    return replace(student, kept_bytes=kept, casts_bytes=casts), []


def teachers_of(
    model: Distiller, built: PreTrainedModel, student: Model, fast: torch.dtype, sharded: bool, ranks: int
) -> tuple[Model | None, int, list[str]]:
    """The largest model that scores, bytes of weights beside the student's, and a line for each unknown teacher."""
    models, total, unknown = [], 0, []
    known, meta = {id(weight) for weight in built.parameters()}, torch.device("meta")
    for part in dict.fromkeys(model.teacher.parts.values()):
        if part.config is not None or "config" in vars(part):  # a teacher that loads `config`; None: the student's
            dtype = _dtype(part.config or model.student_config, fast)
            own = replace(student, dtype=dtype, computing=dtype.itemsize, adapter=0)
            if part.config is not None:
                loaded = build(part.config, f"{part.key}.init_args.model", dtype)
                own = measured(loaded, None, part.config.quantization)
            layers = own.linear * dtype.itemsize
            total += own.bytes - (layers - layers // ranks - layers // own.layers if part.shard else 0)
            models.append(own)
            continue
        try:
            assert isinstance(part, ModelTeacher), "the teacher has no model"
            with meta:
                part.setup(Student(built, cast(Any, None)), model.student_config, meta)
            copied = sum(weight.nbytes for weight in part.model.parameters() if id(weight) not in known)
        except Exception:
            unknown.append(f"{part.key}: the memory of {type(part).__name__}")
            continue
        # A teacher that scores with a sharded student's weights gathers all of them.
        total += copied or (student.bytes if sharded else 0)
        models.append(student)
    return max(models, key=lambda each: each.bytes, default=None), total, unknown


def writers_of(model: Distiller, auto: torch.dtype) -> tuple[tuple[str, ...], torch.dtype, list[str]]:
    """The writers in this process, the type of a student's weights that write, and a line for each unknown part."""
    names, unknown, dtype = set(), [], auto
    for part in model.rollout.parts:
        if part.asks_teacher:
            names.add("teacher")
        if part.writer == "student" and not part.engines:
            names.add("student")
            dtype = getattr(part, "dtype", None) or dtype
        elif part.writer in ("student", "other"):
            name = type(part.engines[0] if part.engines else part).__name__
            unknown.append(f"model.rollout: the memory of {name} on this device")
    return tuple(sorted(names)), dtype, unknown
