"""What a run asks of its machine: devices, and a port where its ranks meet."""

import os
import re
import socket
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from opcd.runtime.errors import UserError

DEVICES = re.compile("gpu|accelerator|devices", re.IGNORECASE)
"""In what Lightning says of devices that are not there."""


def in_full(error: MisconfigurationException, config: Any) -> str:
    """What Lightning says of a trainer; of devices, what was asked for and what there is before it."""
    if not DEVICES.search(str(error)):
        return str(error)
    return (
        f"trainer.accelerator is {config['accelerator']} and trainer.devices {config['devices']}, and this machine has "
        f"{torch.cuda.device_count()} CUDA GPUs; ask for what there is, or for --trainer.accelerator cpu ({error})"
    )


def check_numbers(config: Any) -> None:
    """Refuse a seed, devices or nodes that no machine has, when the config is read (UserError)."""
    seed, devices, nodes = config.seed_everything, config.trainer.devices, config.trainer.num_nodes
    if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything: {seed} is no seed; give a whole number from 0 to {2**32 - 1}")
    several = devices if isinstance(devices, list) else str(devices).split(",") if "," in str(devices) else None
    numbers = [int(number) for number in several or [devices] if re.fullmatch(r"\s*-?\d+\s*", str(number))]
    least = -1 if several is None else 0
    if numbers and min(numbers) < least:
        raise UserError(
            f"trainer.devices: {devices}: there is no such device; give how many (-1: all), a list of their numbers "
            "from 0, or auto"
        )
    if nodes < 1:
        raise UserError(f"trainer.num_nodes must be at least 1, not {nodes}")


def check_port(trainer: Trainer) -> None:
    """Refuse a MASTER_PORT that somebody else listens on, before other ranks start and wait for him (UserError)."""
    port, environment = os.environ.get("MASTER_PORT"), getattr(trainer.strategy, "cluster_environment", None)
    if port is None or trainer.world_size == 1 or not isinstance(environment, LightningEnvironment):
        return
    # Whoever is started by torchrun, or by rank 0, finds the port in use, and rightly so.
    if environment.creates_processes_externally or environment.node_rank():
        return
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"the ranks cannot meet at MASTER_PORT {port}: {error}; set another one, or none: a free one is taken then"
        ) from error
