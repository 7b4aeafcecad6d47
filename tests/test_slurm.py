"""configs/slurm.sh as its header starts it: as many queries a step as the recipe says."""

import re

import pytest
import yaml

from opcd.data import ContextQueryDataModule
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs"


def queries_a_step(script: str, *configs: str) -> int:
    """The batch size, which nodes x processes a node must divide."""
    trainer: dict[str, object] = {}
    data: dict[str, object] = {}
    for config in configs:
        values = yaml.safe_load((CONFIGS / config).read_text())
        trainer |= values.get("trainer", {})
        data |= values.get("data", {})
    asked = dict(re.findall(r"^#SBATCH --(nodes|ntasks-per-node|gpus-per-node)=(\d+)", script, re.MULTILINE))
    assert int(asked["ntasks-per-node"]) == int(asked["gpus-per-node"]) == trainer["devices"]
    data_module = ContextQueryDataModule(batch_size=data["batch_size"])
    return int(asked["nodes"]) * trainer["devices"] * data_module.rows_on_each(int(asked["nodes"]) * trainer["devices"])


@pytest.mark.case("W2")
def test_the_papers_queries_a_step():
    script = (CONFIGS / "slurm.sh").read_text()
    configs = re.findall(r"--config configs/(\S+\.yaml)", script)
    assert configs == ["cross_size.yaml", "node_8gpu.yaml"]
    alone = yaml.safe_load((CONFIGS / "cross_size.yaml").read_text())["data"]["batch_size"]
    assert queries_a_step(script, *configs) == alone == 128
