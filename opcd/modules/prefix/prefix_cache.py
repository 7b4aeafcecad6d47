"""The prefix cache: keys and values of a context, computed once for all rows that follow it."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opcd.models.key_value_prefix import CACHE
from opcd.modules.lm.generation import EncodedPrefix, eval_mode, own_precision
from opcd.modules.lm.hidden_states import last_hidden
from opcd.modules.lm.layer_kinds import sliding_window
from opcd.modules.prefix.packing import cannot_pack, pack_groups, packed_rows
from opcd.runtime.errors import UserError
from opcd.runtime.interruption import doing

Mode = Literal["auto", "always", "never"]

SHORTEST = 16
"""Fewest tokens of a prefix that gets a pass of its own."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest relative difference (norm over norm) of hidden states from the full pass; other types: `LOW_PRECISION`."""
LOW_PRECISION = 0.05


class PrefixCache:
    """A cache of prefixes; rows behind the same prefix are scored packed into one row, without padding.

    Two rows of the first pack are scored both ways; if they differ, the full pass is used from then on.

    Args:
        mode: auto compares and falls back with a warning; always does not compare; never uses the full pass.
        memory_mib: most MiB of keys and values that are cached; the least recently used prefix is dropped first.
    """

    def __init__(self, mode: Mode = "auto", memory_mib: int = 2048) -> None:
        self.mode, self.memory_mib = mode, memory_mib
        self._entries: OrderedDict[tuple[int, ...], EncodedPrefix] = OrderedDict()
        self._seen: set[int] = set()  # hashes: there may be as many contexts as rows
        self._agrees: bool | None = {"auto": None, "always": True, "never": False}[mode]
        self._said = False
        self._version: Hashable = None
        self._missing: list[tuple[int, ...]] = []  # cached when the run was stopped; the next pass computes them

    def use(self, version: Hashable) -> None:
        """Set the version of the weights from now on; keys and values of another version are dropped.

        Args:
            version: equal for equal weights. The first one drops nothing: what a resumed run had cached is computed.
        """
        if self._version is not None and version != self._version:
            self.clear()
        self._version = version

    def clear(self) -> None:
        """Free the memory of all keys and values."""
        self._entries.clear()
        self._missing.clear()

    def state_dict(self) -> dict[str, Any]:
        """What decides which rows are packed, because packed and full passes round differently; no keys and values."""
        kept = self._missing or self._entries
        return {"kept": list(kept), "seen": sorted(self._seen), "agrees": self._agrees}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; keys and values that are cached already stay."""
        kept, there = state["kept"], self._entries
        self._missing = [] if all(ids in there for ids in kept) else list(kept)
        self._entries = OrderedDict((ids, there[ids]) for ids in kept if not self._missing)
        self._seen, self._agrees = set(state["seen"]), state["agrees"]

    def score(
        self, model: PreTrainedModel, prefixes: list[Tensor], rows: list[tuple[Tensor, Tensor]], max_tokens: int
    ) -> dict[int, Tensor]:
        """Last hidden states [R, H] that predict the responses, by row number, of the rows that share a prefix.

        Args:
            model: in eval mode, without gradient.
            prefixes: B tensors of the token ids that a row may begin with; equal ids are shared.
            rows: B pairs of prompt [Q] and response [R].
            max_tokens: most tokens of one pass beyond the prefix.
        """
        if self._agrees is False:
            return {}
        self._compute_missing(model)
        shared: dict[tuple[int, ...], list[int]] = {}
        for number, (prefix, (prompt, _)) in enumerate(zip(prefixes, rows, strict=True)):
            length = min(_common(prefix, prompt), len(prompt) - 1)  # the last token's state predicts the response
            if length >= SHORTEST:
                shared.setdefault(tuple(prefix[:length].tolist()), []).append(number)
        found: dict[int, Tensor] = {}
        for ids, numbers in shared.items():
            known = len(numbers) > 1 or ids in self._entries or hash(ids) in self._seen
            self._seen.add(hash(ids))
            if not known:  # the first row of a prefix, alone in its batch, gains nothing
                continue
            if not self._usable(model):
                return {}
            suffixes = [(rows[n][0][len(ids) :], rows[n][1]) for n in numbers]
            for group in pack_groups([len(q) + len(r) - 1 for q, r in suffixes], max_tokens):
                part = [numbers[i] for i in group]
                hidden = self._checked(model, ids, [suffixes[i] for i in group], [rows[n] for n in part])
                if hidden is None:
                    return {}
                found.update(zip(part, hidden, strict=True))
        return found

    @torch.no_grad()
    def encoded(
        self, model: PreTrainedModel, prefixes: list[Tensor], prompts: list[Tensor]
    ) -> list[EncodedPrefix] | None:
        """The prefix of each prompt, for `generate`; None if no prefix is shared, or the model cannot use it.

        Args:
            model: in any mode.
            prefixes: B tensors of the token ids that a prompt may begin with.
            prompts: B tensors [Q] of token ids.
        """
        with eval_mode(model), own_precision(model):
            self._compute_missing(model)
            pairs = list(zip(prefixes, prompts, strict=True))
            ids = [tuple(a[: min(_common(a, b), len(b) - 1)].tolist()) for a, b in pairs]
            shapes = {(len(prefix), len(prompt)) for prefix, prompt in zip(ids, prompts, strict=True)}
            if sliding_window(model) is not None and len(shapes) > 1:
                return None  # padding would count as distance
            shared = len(set(ids)) < len(ids) or any(prefix in self._entries for prefix in ids)
            if not shared or min(map(len, ids)) < SHORTEST or not self._usable(model):
                return None
            if self._agrees is None:  # compare first: two rows that end one token early
                self.score(model, [prefixes[0]] * 2, [(prompts[0][:-1], prompts[0][-1:])] * 2, len(prompts[0]))
            return [self._entry(model, prefix) for prefix in ids] if self._agrees else None

    def _usable(self, model: PreTrainedModel) -> bool:
        """Whether rows may share a prefix, as far as the model's config tells.

        Raises:
            UserError: they cannot, and the mode is always.
        """
        if self._agrees is False or (why := cannot_pack(model)) is None:
            return self._agrees is not False
        if self.mode == "always":
            raise UserError(
                f"model.shared_prefix: always does not work for {type(model).__name__} ({why}); set it to auto or never"
            )
        self._fall_back(model, why)
        return False

    def _fall_back(self, model: PreTrainedModel, why: str) -> None:
        self._agrees = False
        self.clear()
        rank_zero_warn(
            f"the shared prefix does not work for {type(model).__name__} ({why}); from here on the full context of "
            "every row runs through the teacher (model.shared_prefix: never turns this warning off)"
        )

    def _compute_missing(self, model: PreTrainedModel) -> None:
        missing, self._missing = self._missing, []
        for ids in missing:
            self._entry(model, ids)

    def _checked(
        self,
        model: PreTrainedModel,
        ids: tuple[int, ...],
        suffixes: list[tuple[Tensor, Tensor]],
        rows: list[tuple[Tensor, Tensor]],
    ) -> list[Tensor] | None:
        """The states of one packed pass, compared with the full pass the first time; None if they differ."""
        if self._agrees:
            return self._packed(model, ids, suffixes)
        doing("comparing the shared context with a full pass (once)")
        # The first and the last row, because packing goes wrong between rows; one at a time, to save memory.
        full = torch.cat([last_hidden(model, [prompt], [response]) for prompt, response in (rows[0], rows[-1])])
        fast: list[Tensor] = []

        def first_and_last() -> Tensor:
            """Run the packed pass; all its states stay in `fast`."""
            fast.extend(self._packed(model, ids, suffixes))
            return torch.cat([fast[0], fast[-1]])

        why = disagreement(first_and_last, full)
        if why is not None:
            self._fall_back(model, why)
            return None
        self._agrees = True
        return fast

    def _packed(
        self, model: PreTrainedModel, ids: tuple[int, ...], suffixes: list[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """The states of rows without their common prefix, packed one after the other; positions restart in each."""
        rows = [torch.cat([prompt, response[:-1]]) for prompt, response in suffixes]
        lengths = [len(row) for row in rows]
        positions = torch.cat([torch.arange(len(ids), len(ids) + length) for length in lengths])
        packed, positions = (x[None].to(model.device) for x in (torch.cat(rows), positions))
        with packed_rows(model, self._entry(model, ids), lengths) as arguments:
            hidden = model.base_model(input_ids=packed, position_ids=positions, **arguments).last_hidden_state[0]
        return [states[len(prompt) - 1 :] for states, (prompt, _) in zip(hidden.split(lengths), suffixes, strict=True)]

    def _entry(self, model: PreTrainedModel, ids: tuple[int, ...]) -> EncodedPrefix:
        """The keys and values of a prefix, from the cache or computed."""
        if ids in self._entries:
            self._entries.move_to_end(ids)
            return self._entries[ids]
        if not self._said:
            doing("first pass over the context (once)", f"{len(ids)} tokens")
            self._said = True
        cache = DynamicCache()
        model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=True, **{CACHE: cache})
        layers: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]
        entry = self._entries[ids] = EncodedPrefix(ids, layers)
        while sum(e.bytes for e in self._entries.values()) > self.memory_mib * 2**20 and len(self._entries) > 1:
            self._entries.popitem(last=False)
        return entry


def _common(one: Tensor, other: Tensor) -> int:
    """The length of the common prefix of two rows."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length].to(one.device)).nonzero()
    return int(differ[0]) if len(differ) else length


def disagreement(fast: Callable[[], Tensor], full: Tensor) -> str | None:
    """The reason why a faster pass cannot replace the full one, in one line; None if they differ by rounding only.

    Args:
        fast: computes the same hidden states [N, H]; an exception counts as a reason.
        full: those of the full pass.
    """
    try:
        difference = float((fast() - full).norm() / full.norm())
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    dtype = torch.bfloat16 if torch.is_autocast_enabled(full.device.type) else full.dtype
    agrees = difference <= TOLERANCE.get(dtype, LOW_PRECISION)
    return None if agrees else f"their hidden states differ by {difference:.2g}"
