"""Checks of the machine: the devices, and the port at which the ranks of a run meet."""

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
"""Words in Lightning's messages about missing devices."""


def in_full(error: MisconfigurationException, config: Any) -> str:
    """Lightning's message about a trainer; about devices, with those that the config wants and the machine has."""
    if not DEVICES.search(str(error)):
        return str(error)
    return (
        f"trainer.accelerator is {config['accelerator']} and trainer.devices {config['devices']}, and this machine has "
        f"{torch.cuda.device_count()} CUDA GPUs; choose devices of this machine, or --trainer.accelerator cpu ({error})"
    )


def check_numbers(config: Any) -> None:
    """Raise UserError for a seed, devices or nodes that no machine has, when the config is read."""
    seed, devices, nodes = config.seed_everything, config.trainer.devices, config.trainer.num_nodes
    if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything: {seed} is no seed; give a whole number from 0 to {2**32 - 1}")
    several = devices if isinstance(devices, list) else str(devices).split(",") if "," in str(devices) else None
    numbers = [int(number) for number in several or [devices] if re.fullmatch(r"\s*-?\d+\s*", str(number))]
    least = -1 if several is None else 0
    if numbers and min(numbers) < least:
        raise UserError(
            f"trainer.devices: {devices}: there is no such device; give a count (-1: all), a list of device numbers "
            "from 0, or auto"
        )
    if nodes < 1:
        raise UserError(f"trainer.num_nodes must be at least 1, not {nodes}")


def check_port(trainer: Trainer) -> None:
    """Raise UserError if MASTER_PORT is in use, before other ranks start and wait."""
    port, environment = os.environ.get("MASTER_PORT"), getattr(trainer.strategy, "cluster_environment", None)
    if port is None or trainer.world_size == 1 or not isinstance(environment, LightningEnvironment):
        return
    # A process that torchrun or rank 0 started finds the port in use: rank 0 listens on it.
    if environment.creates_processes_externally or environment.node_rank():
        return
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"the ranks cannot meet at MASTER_PORT {port}: {error}; set another port, or none for a free one"
        ) from error
