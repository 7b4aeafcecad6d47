"""`opcd doctor --plan`: the memory of a run, part by part, before a weight is loaded.

    opcd doctor --plan --config configs/quickstart.yaml
    opcd doctor --plan --config configs/cross_size.yaml --config configs/teacher_4bit.yaml --trainer.accelerator gpu \
        --memory 80GB --query_tokens 512 --context_tokens 4096
"""

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import ArgumentError

from opcd.cli.fit import fit_parser
from opcd.config.parsing import Parser
from opcd.config.precheck import checked
from opcd.planning.reading import read_setting
from opcd.planning.sizes import PHASES, Parts, Setting, parts, peak, rows_in_memory, until_it_fits
from opcd.runtime.errors import UserError

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
STATUS = Path("/proc/self/status")


def main(args: list[str]) -> int:
    """Print the table. Returns 0, or 1 if the run does not fit.

    Raises:
        UserError: the config is wrong, or the plan does not support it.
    """
    parser = Parser(
        prog="opcd doctor --plan",
        description="Predict the memory of a run on one rank. All other options are those of `opcd fit`. A model may "
        "be a folder with a config.json alone.",
    )
    parser.add_argument("--memory", type=size, help="memory of a device, such as 24GiB; default: of this machine's")
    tokens = "tokens of the longest prompt without the context; default: as in data.train"
    parser.add_argument("--query_tokens", type=_count, help=tokens)
    parser.add_argument("--context_tokens", type=_count, help="tokens that the longest context adds; same default")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")
    options, rest = parser.parse_known_args(args)
    setting = read(rest, options.query_tokens, options.context_tokens)
    memory = options.memory or _memory(setting)
    setting = replace(setting, memory=memory)
    if setting.gpu and setting.at_a_time is None and memory is not None and setting.writers:
        setting = replace(setting, at_a_time=rows_in_memory(setting, memory))
    found = parts(setting)
    phase, most = peak(found)
    if options.json:
        print(json.dumps({"peak": most, "phase": phase, "parts": found, "not_counted": setting.not_counted}))
    else:
        print("\n".join([_title(setting), "", *table(found), "", *_verdict(setting, phase, most, memory)]))
    return 1 if memory is not None and most > memory else 0


def read(words: list[str], query: int | None = None, context: int | None = None) -> Setting:
    """Read the setting of a config, given as the words after `opcd fit`. Rows give the lengths that are None."""
    parser = fit_parser()
    try:
        config = parser.parse_args(checked("fit", words, data=False))
        trainer = config.trainer.clone()
        # The run's devices may be on another machine.
        for name, value in {"accelerator": "cpu", "devices": 1, "strategy": "auto", "num_nodes": 1}.items():
            config.trainer[name] = value
        config.trainer.logger, config.trainer.callbacks = False, None
        made = parser.instantiate_classes(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    except SystemExit as end:
        raise ArgumentError(None, "opcd doctor --plan: see `opcd doctor --plan --help`") from end
    # Bytes of this process, which has the imports of a run; 0 if the system does not tell.
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    resident = next((int(line.split()[1]) * 2**10 for line in lines if line.startswith("VmRSS")), 0)
    return read_setting(trainer, made, query, context, resident)


def table(found: Parts) -> list[str]:
    """The lines of a table: parts by phases, in MiB, and their sums."""
    sums = {phase: sum(part.get(phase, 0) for part in found.values()) for phase in PHASES}
    rows = [
        f"{name:<26}" + "".join(f"{phases.get(phase, 0) / 2**20:>11,.0f}" for phase in PHASES)
        for name, phases in [*found.items(), ("sum", sums)]
    ]
    return [f"{'MiB':<26}" + "".join(f"{phase:>11}" for phase in PHASES), *rows]


def size(text: str) -> int:
    """Parse 24GiB, 80GB or 800MiB. Returns bytes."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"needs a number and one of {', '.join(UNITS)}, such as 24GiB, not {text!r}")
    return round(float(found[1]) * UNITS[found[2]])


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


def _memory(setting: Setting) -> int | None:
    """Bytes of this machine's device for one rank; None if it has no GPU and the run wants one."""
    if not setting.gpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // setting.ranks
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _title(s: Setting) -> str:
    device = f"{s.ranks} {'GPU' if s.gpu else 'CPU'}{'s' * (s.ranks > 1)}{', the student sharded' * s.sharded}"
    prompts = f"prompts of {s.query} tokens, with the context {s.context} more, responses of {s.response}"
    rows = f"{s.batch} rows a step{' on each' * (s.ranks > 1)}"
    return f"{device}; {rows}, {prompts}; micro-batches of {s.micro_rows} rows, {s.tokens} tokens"


def _verdict(setting: Setting, phase: str, most: int, memory: int | None) -> list[str]:
    lines = [f"not counted: {what}" for what in setting.not_counted]
    if setting.gpu:
        lines.append("not counted: the CUDA context, and what the allocator keeps between its blocks")
    if setting.at_a_time is not None and setting.at_a_time < setting.batch:
        lines.append(f"the rollout writes {setting.at_a_time} of {setting.batch} rows at a time")
    lines.append(f"peak: {_gib(most)}, in the phase {phase}")
    if memory is None:
        return [*lines, "the memory of the device is unknown: give --memory, such as 24GiB"]
    if most <= memory:
        return [*lines, f"fits in {_gib(memory)}: {_gib(memory - most)} are left"]
    taken = until_it_fits(setting, memory)
    helps = "; changes that help, the largest first:" if taken else ", and no change helps"
    lines.append(f"does not fit in {_gib(memory)}{helps}")
    lines += [f"  {_gib(after):>12}  with {name}" for name, after in taken]
    return lines + (["  and this is not enough"] if taken and taken[-1][1] > memory else [])


def _gib(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB"
