"""FSDP2 (torch's `fully_shard`) with checkpoints like DDP's, and the check of `trainer.strategy`."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from opcd.modules.distributed.sharding import full_tensor, part_of
from opcd.runtime.errors import UserError

SHARDED = "fsdp2"
"""The name of `FSDP2Strategy` in `trainer.strategy`."""
PATIENCE = timedelta(hours=6)
"""How long a rank waits for the longest rollout of another; Lightning's 30 minutes may end a run."""


class FSDP2Strategy(ModelParallelStrategy):
    """Shards weights, gradients and moments of a student across the ranks; a layer is gathered when it computes.

    A checkpoint is one file with full tensors, as one process or DDP writes it: a run can be resumed with another
    number of ranks, and under another strategy. `trainer.strategy: fsdp2` is this class.

    Args:
        data_parallel_size: auto, or the number of all ranks.
        tensor_parallel_size: 1: there is no tensor parallelism.
        process_group_backend: torch's name of the backend; null chooses by device.
        timeout: how long a rank waits for the others.

    Raises:
        ValueError: for a tensor_parallel_size other than 1.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = PATIENCE,
    ) -> None:
        if tensor_parallel_size not in ("auto", 1):
            raise ValueError(
                f"trainer.strategy: tensor_parallel_size is {tensor_parallel_size}, but tensor parallelism is not "
                "supported; set it to 1: the weights are sharded across all ranks"
            )
        super().__init__(data_parallel_size, 1, False, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """Join the other ranks, each of which holds a shard (UserError for another `data_parallel_size`)."""
        ranks = self.num_nodes * self.num_processes
        if self._data_parallel_size not in ("auto", ranks):
            raise UserError(
                f"trainer.strategy: data_parallel_size is {self._data_parallel_size}, but there are {ranks} ranks; "
                "leave it at auto"
            )
        self._data_parallel_size = ranks
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning restore the optimizer's state, as under DDP."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Full tensors on the CPU of rank 0; nothing on the other ranks, which must call this too."""
        assert self.model is not None
        return self._collected(self.model.state_dict(keep_vars=True))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same of the optimizer, in the form of a single process."""
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._collected(own.state_dict())

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """The file, verified, on the CPU of every rank."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's shard of the weights."""
        assert self.model is not None
        own = self.model.state_dict()
        parts = {name: part_of(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.model.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shard of the optimizer's state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            owners = [weight for group in optimizer.param_groups for weight in group["params"]]
            state = {
                number: {name: part_of(value, owners[number]) for name, value in kept.items()}
                for number, kept in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _collected(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with full tensors, gathered one at a time; tied weights stay tied."""
        found: dict[int, Tensor | None] = {}

        def collected(value: Any) -> Any:
            """A leaf of the state, gathered."""
            if not isinstance(value, Tensor):
                return value
            if id(value) not in found:
                tensor = full_tensor(value.detach())
                found[id(value)] = tensor.cpu() if self.is_global_zero else None
            return found[id(value)]

        everything: dict[str, Any] = tree_map(collected, dict(state))
        return everything if self.is_global_zero else {}


SHARDED_NAMES = (SHARDED, FSDP2Strategy.__name__.lower())
StrategyRegistry.register(SHARDED, FSDP2Strategy, description="FSDP2: fully_shard over all ranks")


def check_configured(strategy: Any) -> None:
    """Check the `trainer.strategy` of a config, a name or a class with its arguments.

    Raises:
        UserError: it is FSDP's first version, DeepSpeed, or Lightning's own FSDP2.
    """
    path = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    name = str(path).rpartition(".")[2]
    if name.lower().startswith(("fsdp", "deepspeed", "modelparallel")) and name.lower() not in SHARDED_NAMES:
        raise UserError(_refused(name))


def wait_for_rollouts(strategy: Strategy) -> None:
    """Let the ranks of a DDP strategy wait for `PATIENCE`, unless it has a timeout of its own."""
    if isinstance(strategy, DDPStrategy) and strategy._timeout == default_pg_timeout:
        strategy._timeout = PATIENCE


def check_strategy(strategy: Strategy) -> None:
    """Raise a UserError for a strategy that the training step does not support."""
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
        raise UserError(_refused(type(strategy).__name__))


def _refused(name: str) -> str:
    return (
        f"trainer.strategy: {name} is not supported; use ddp, or {SHARDED}, which shards weights, gradients and "
        "moments (with arguments: opcd.modules.FSDP2Strategy)"
    )
