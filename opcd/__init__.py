"""On-policy context distillation: put a context into a language model's weights."""

import os
from typing import TYPE_CHECKING

from opcd.runtime.lazy import lazily
from opcd.runtime.versions import VERSION as __version__

if TYPE_CHECKING:
    from opcd.data.datamodule import ContextQueryDataModule
    from opcd.distilling import Result, distill
    from opcd.models.model_source import ModelConfig
    from opcd.modules.distiller import Distiller
    from opcd.runtime.errors import UserError

__all__ = ["ContextQueryDataModule", "Distiller", "ModelConfig", "Result", "UserError", "__version__", "distill"]

__getattr__ = lazily(__name__)

# Both are read once, when torch is loaded or first allocates, so they stand before anything that imports torch.
# Large tensors on a CPU lie in huge pages, where a step maps them anew at a fraction of the page faults (docs/log.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# OpenMP's threads wait for one another in a busy loop: next to another busy process a step took 16 times as long.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
