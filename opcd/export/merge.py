"""An adapter merged into the weights of its base, as a folder that is read again and compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opcd.export.export_check import logits_of, prompt_ids
from opcd.models import ModelConfig, load_model
from opcd.modules.lm.adapters import merged
from opcd.modules.lm.generation import eval_mode
from opcd.modules.student import Student
from opcd.runtime.errors import UserError

EXACT, LOW_PRECISION = 1e-3, 0.1
"""The largest allowed median over positions of the logits' relative difference, in float32 and in bfloat16 or with
quantized layers. The median, because rounding may send a token to another expert."""


def write_merged(student: Student, folder: Path, dtype: torch.dtype, config: ModelConfig) -> None:
    """Write a student with an adapter as one model for plain transformers.

    Args:
        student: the trained student.
        folder: the output folder.
        dtype: dtype of the written weights.
        config: the config that loaded the student; the folder is read again with it.

    Raises:
        UserError: the merged model's logits differ from the student's, or the folder's weights from the merged model's.
    """
    copy = Student(merged(student.model, dtype).eval(), student.tokenizer)
    _check_logits(student, copy)
    copy.save(folder, dtype)
    _check_folder(copy, folder, dtype, config)


def _check_logits(student: Student, copy: Student) -> None:
    prompt = prompt_ids(student.tokenizer)
    with eval_mode(student.model):
        live = logits_of(student.model, prompt)
    differences = (logits_of(copy.model, prompt) - live).norm(dim=-1) / live.norm(dim=-1)
    quantized = getattr(student.model.config, "quantization_config", None) is not None
    exact = student.model.dtype == copy.model.dtype == torch.float32 and not quantized
    if not (difference := float(differences.median())) <= (EXACT if exact else LOW_PRECISION):
        raise UserError(f"the merged model has other logits than the student: by {difference:.2g} of their size")


def _check_folder(copy: Student, folder: Path, dtype: torch.dtype, config: ModelConfig) -> None:
    written: Any = str(dtype).removeprefix("torch.")
    plain = replace(config, name=str(folder), dtype=written, quantization="none", revision=None)
    expected, found = copy.model.state_dict(), load_model(plain, key="ExportStudent.merge").state_dict()
    if odd := sorted(expected.keys() ^ found.keys()):
        raise UserError(f"the merged model's folder has weights of other names when it is read again: {odd[0]}")
    for name, weight in expected.items():
        if not torch.equal(weight.cpu().float(), found[name].float()):
            raise UserError(f"the merged model's folder has other values of {name} when it is read again")
