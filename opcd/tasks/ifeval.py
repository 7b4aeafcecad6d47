"""IFEval: lm-eval's checks on rows from a file or the hub, without a download during scoring."""

from typing import Any

from opcd.data import read_rows
from opcd.data.example import refuse_unread
from opcd.runtime.errors import UserError
from opcd.runtime.extras import install_hint
from opcd.tasks.punkt import provide_punkt

FIELDS = {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list}


def dataset(source: str, key: str = "source", **_: Any) -> dict[str, Any]:
    """The rows of a file or a hub data set.

    Raises:
        UserError: a row has a missing field, or an instruction that lm-eval cannot check.
    """
    from datasets import Dataset

    known = _instructions()
    docs: list[dict[str, Any]] = []
    for where, row in read_rows(source, key):
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row of IFEval is an object with {', '.join(FIELDS)}")
        refuse_unread(row, where)
        for name, kind in FIELDS.items():
            if not isinstance(row.get(name), kind):
                raise UserError(
                    f"{where}: {name} is missing or of a wrong type; a row of IFEval has {', '.join(FIELDS)}"
                )
        unknown = [name for name in row["instruction_id_list"] if name not in known]
        if unknown or not row["instruction_id_list"] or len(row["kwargs"]) != len(row["instruction_id_list"]):
            why = f"unknown instruction {unknown[0]!r}" if unknown else "each instruction needs one kwargs"
            raise UserError(f"{where}: no answer to this row can be checked: {why}")
        docs.append({**{name: row[name] for name in FIELDS}, "source": where})
    if not docs:
        raise UserError(f"{key}: {source} has no rows")
    return {"test": Dataset.from_list(docs)}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """lm-eval's four scores: bool for the prompt, a list of bools for its instructions."""
    from lm_eval.tasks.ifeval import utils

    return dict(utils.process_results(doc, results))


def share_of_instructions(items: list[list[bool]]) -> float:
    """The share of all instructions that are followed, as lm-eval computes it."""
    from lm_eval.tasks.ifeval import utils

    return float(utils.agg_inst_level_acc(items))


def _instructions() -> set[str]:
    provide_punkt()  # first: lm-eval's module tries a download when imported, and reports success even if it fails
    try:
        from langdetect import DetectorFactory
        from lm_eval.tasks.ifeval import instructions_registry
    except ImportError as error:
        raise UserError(f"ifeval needs {error.name}: {install_hint('evaluation')}") from error
    DetectorFactory.seed = 0  # langdetect guesses at random, with a new seed at each call by default
    return set(instructions_registry.INSTRUCTION_DICT)
