"""Adapter folders of somebody else: what is refused before peft reads them."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opcd.models.adapter_folder import ADAPTER, PICKLED, WEIGHTS, base_name, lora_settings
from opcd.runtime.errors import UserError

LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
TENSORS = {LAYER.format("A"): torch.ones(4, 8), LAYER.format("B"): torch.ones(8, 4)}
SETTINGS = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "target_modules": ["q_proj"]}


@pytest.fixture
def folder(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / WEIGHTS)
    (tmp_path / ADAPTER).write_text(json.dumps(SETTINGS))
    return tmp_path


def refused(folder: Path, **settings: object) -> str:
    (folder / ADAPTER).write_text(json.dumps(SETTINGS | settings))
    with pytest.raises(UserError) as error:
        lora_settings(folder, "student", False, "student.pickled_weights: true")
    return str(error.value)


def test_settings_of_a_lora(folder):
    assert lora_settings(folder, "student", False, "") == {"r": 4, "target_modules": ["q_proj"]}
    (folder / ADAPTER).write_text(json.dumps(SETTINGS | {"target_modules": "(a+)+$"}))
    # A pattern is never matched: the layers are those that the weights name.
    assert lora_settings(folder, "student", False, "")["target_modules"] == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 10**7}, "a rank of 1e+07, but the weights have at most 4"),
        ({"rank_pattern": {"q_proj": 9}}, "a rank of 9, but the weights have at most 4"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern must be ranks by plain names"),
        ({"exclude_modules": "(a+)+$"}, "exclude_modules must be a list of names"),
        ({"r": True}, "r must be an integer greater than 0"),
        ({"lora_dropout": 1}, "lora_dropout must be a number below 1"),
        ({"init_lora_weights": "corda"}, "init_lora_weights must be a known method"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set to"),
    ],
)
def test_a_setting_that_is_refused(folder, settings, says):
    assert says in refused(folder, **settings)


def test_a_pickle_is_read_only_where_it_is_allowed_and_without_its_code(folder):
    (folder / WEIGHTS).unlink()
    assert f"has no {WEIGHTS}" in refused(folder)
    torch.save(TENSORS, folder / PICKLED)
    assert "are a pickle" in refused(folder) and "student.pickled_weights: true" in refused(folder)
    (folder / ADAPTER).write_text(json.dumps(SETTINGS))
    assert lora_settings(folder, "student", True, "")["r"] == 4
    (folder / PICKLED).write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match="cannot load"):
        lora_settings(folder, "student", True, "")


@pytest.mark.parametrize("base", [None, "", 3, "a\0b"])
def test_an_adapter_that_does_not_name_its_base(folder, base):
    (folder / ADAPTER).write_text(json.dumps(SETTINGS | {"base_model_name_or_path": base}))
    with pytest.raises(UserError, match="does not name its base model"):
        base_name(folder, "student")
