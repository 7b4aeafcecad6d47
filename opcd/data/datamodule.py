"""The data of a run: examples from files, two views of each, batches."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import combinations, islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler

from opcd.data.anchors import AnchoredSampler, Anchors, Listed
from opcd.data.batch import Batch, Row
from opcd.data.contexts import ContextSource, context_hash, read_contexts
from opcd.data.example import ANCHORS, Example, OnBadRow, rows_hash
from opcd.data.length_limits import LengthBudgets, OverlongContext, OverlongQuery, longest_prompts
from opcd.data.readers import STAGES, ExampleSource, as_source, not_set, read_examples
from opcd.data.teacher_names import TeacherModels, check_same_vocabulary, teacher_key, with_teachers
from opcd.data.views import STUDENT, Placement, Views, split_template
from opcd.models import ModelConfig, load_tokenizer
from opcd.runtime.errors import UserError


class ContextQueryDataModule(LightningDataModule):
    """Queries, and the contexts that the teacher sees with them.

    A source is a .jsonl, .json, .csv or .parquet file (.jsonl.gz and the like too), a pattern of several files
    (rows/*.jsonl), a hub data set (org/name:split or org/name/config:split), a class that makes rows
    (opcd.data.DataSets: several sources; opcd.games.GameSeeds), or the rows themselves: a list of rows or of queries;
    from Python any iterable, such as a datasets.Dataset. A row is {"query", "context", "response", "reference",
    "teacher"} (only the query is required; text or chat messages), TRL's {"prompt", "completion",
    "privileged_context"}, {"messages"}, {"content", "answer"}, or in the shape of DAPO-Math-17k. Column names of
    different shapes can be combined.

    Args:
        train: source of the training rows.
        val: source of the validation rows.
        test: source of the test rows.
        predict: source of the rows to answer.
        context: file with the context of all rows without their own: text (one context), or .json or .jsonl with a list
            from which each row draws one in each epoch; or a list of the texts themselves.
        placement: where the teacher's context goes: system (the system message), user (the last user message) or raw
            (before the query, without a chat template).
        template: joins context and query for placement user and raw; holds {context} and {query} once each. Default:
            the two with a blank line between them.
        batch_size: queries of an optimizer step, over all devices, among which they are divided; with anchors the most:
            the share need not come out even.
        eval_batch_size: queries in a batch of the other splits, per device. Default: those of a device in training.
        max_context_tokens: maximum number of tokens of a context's own text.
        overlong_context: what happens to a longer context: raise an error, drop the row (or the context from the list),
            or cut the context's beginning (cut_left) or end (cut_right).
        max_query_tokens: maximum number of tokens of a student's prompt.
        overlong_query: what happens to a row with a longer prompt: raise an error, or drop the row.
        on_bad_row: raise an error for the first malformed row, or skip all such rows and warn of their number.
        shuffle: draw a new order of the training rows in each epoch; it depends on the seed and the epoch only.
        seed: seed of the order and of the drawn contexts.
        num_workers: number of processes that tokenize rows ahead of the step. 0: the main process, before each step.
        anchors: general prompts among the training rows, whose teacher is the student as it was before training,
            without a context: they hold its other answers where they were. null: none.
        student: the student's model; the command line links it from model.student.
        teacher: the teacher's model, or those of several teachers (`RoutedTeachers.models`) from which the rows choose
            by name; the command line links it from model.teacher. Default: student.

    Raises:
        UserError: an argument is wrong or has no effect.
    """

    def __init__(
        self,
        train: str | ExampleSource | Iterable[Any] | None = None,
        val: str | ExampleSource | Iterable[Any] | None = None,
        test: str | ExampleSource | Iterable[Any] | None = None,
        predict: str | ExampleSource | Iterable[Any] | None = None,
        context: str | list[str] | None = None,
        placement: Placement = "system",
        template: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_context_tokens: int | None = None,
        overlong_context: OverlongContext = "raise",
        max_query_tokens: int | None = None,
        overlong_query: OverlongQuery = "raise",
        on_bad_row: OnBadRow = "raise",
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        anchors: Anchors | None = None,
        student: ModelConfig | None = None,
        teacher: ModelConfig | TeacherModels | None = None,
    ) -> None:
        super().__init__()
        given = {"train": train, "val": val, "test": test, "predict": predict}
        self.sources = {split: as_source(rows, f"data.{split}") for split, rows in given.items()}
        _refuse_overlaps({split: self.sources[split] for split in ("train", "val", "test")})
        self.context = context
        split_template(template, placement)  # raises for a wrong one before anything is read
        self.placement, self.template = placement, template
        self.batch_size = _at_least(1, batch_size, "batch_size")
        self.anchors = anchors
        if anchors is not None:
            anchors.rows_beside(batch_size)  # raises for a share that leaves no row with the context
        self.eval_batch_size = None if eval_batch_size is None else _at_least(1, eval_batch_size, "eval_batch_size")
        self.budgets = LengthBudgets(max_context_tokens, overlong_context, max_query_tokens, overlong_query)
        self.on_bad_row, self.shuffle, self.seed = on_bad_row, shuffle, seed
        self.num_workers = _at_least(0, num_workers, "num_workers")
        self.student = student or ModelConfig()
        self.teacher = teacher
        if val is None:
            # Lightning then runs no validation; it warns of an empty list of loaders.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
        self._examples: dict[str, list[Example]] = {}
        self._longest: dict[str, tuple[int, dict[str | None, int]]] = {}
        self._views: dict[str | None, Views] = {}
        self._taught = True
        self._begin = {"epoch": 0, "samples": 0}
        self._trained_on: Mapping[str, Any] = {}
        self._templates: list[str] = []

    def setup(self, stage: str) -> None:
        """Read the rows of a stage (fit, validate, test, predict), and make all checks that need no model.

        Raises:
            UserError: a source is missing or wrong, the tokenizers do not fit, or something is too long.
        """
        splits = STAGES[stage]
        if self.sources[splits[0]] is None:
            raise UserError(not_set(stage))
        rows = {
            split: self._read(split, source)
            for split in splits
            if (source := self.sources[split]) is not None and split not in self._examples
        }
        contexts, known = self._contexts, {**self._examples, **rows}
        known.pop(ANCHORS, None)
        contexts.check(known, complete=all(source is None or split in known for split, source in self.sources.items()))
        if not self._views or self._taught is (stage == "predict"):
            self._taught = stage != "predict"  # the student predicts with the context itself: no teacher is needed
            self._views = self._make_views()
            contexts.contexts = self.budgets.limit_contexts(contexts.contexts, self.views)
            for number, context in enumerate(contexts.contexts if self._taught else [], start=1):
                for views in self._views.values():
                    views.check_context(context, f"data.context, context {number}")
        if self.anchors is not None and stage == "fit":
            self._views[ANCHORS] = self.views
            if ANCHORS not in self._examples:
                rows[ANCHORS] = self.anchors.read(self.on_bad_row)
        for split, examples in rows.items():
            kept = self._usable(examples, f"data.{split}")
            self._longest[split] = longest_prompts(kept, contexts, self._views)
            self._examples[split] = kept
        if stage == "fit":
            self._check_trained_on()

    def go_on_from(self, trained_on: Mapping[str, Any]) -> None:
        """Let `setup` compare rows and contexts with those of a checkpoint (its `state_dict` of this module)."""
        self._trained_on = trained_on

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the training data that is in files, not in the config: rows, contexts and chat templates."""
        anchors = {} if self.anchors is None else {ANCHORS: rows_hash(self.examples(ANCHORS))}
        return anchors | {
            "rows": rows_hash(self.examples("train")),
            "contexts": context_hash(self._contexts.contexts),
            "chat templates": context_hash(self._templates),
        }

    @property
    def views(self) -> Views:
        """The encoder of prompts and responses, after `setup`; of several teachers, the first one's."""
        if not self._views:
            raise RuntimeError("call setup(stage) first")
        return next(iter(self._views.values()))

    @property
    def contexts(self) -> list[str]:
        """The contexts that the teacher sees, after `setup`: data.context, then the rows' own."""
        own = {example.context: None for split in self._examples.values() for example in split if example.context}
        return [*self._contexts.contexts, *own]

    @property
    def context_hash(self) -> str:
        """SHA-256 of `contexts`."""
        return context_hash(self.contexts)

    def examples(self, split: str) -> list[Example]:
        """The rows of a split (train, anchors, val, test, predict) after `setup`, without the dropped ones."""
        if split not in self._examples:
            raise RuntimeError(f"the split {split!r} is not set up; call setup with a stage that reads it: {STAGES}")
        return self._examples[split]

    def longest_student_prompt(self, split: str) -> int:
        """Tokens of the longest student prompt of a split, after `setup`."""
        return self._longest[split][0]

    def longest_teacher_prompt(self, split: str, teacher: str | None = None) -> int:
        """Tokens of a teacher's longest prompt in a split, for any drawn contexts, after `setup`."""
        return self._longest[split][1][teacher]

    def train_dataloader(self) -> DataLoader[Example]:
        """Batches of training rows. With several ranks, rows are repeated until all ranks have as many."""
        dataset: Any = self.examples("train")
        ranks = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        begin, self._begin = self._begin, {"epoch": 0, "samples": 0}
        options = {**ranks, "shuffle": self.shuffle, "seed": self.seed}
        start = begin["samples"] // ranks["num_replicas"]
        sampler: ResumableSampler | AnchoredSampler
        size = self.rows_on_each(ranks["num_replicas"])
        if self.anchors is None:
            sampler = ResumableSampler(dataset, **options)
        else:
            count = len(self.examples(ANCHORS))
            sampler = AnchoredSampler(dataset, self.anchors, count, size, **options)
            dataset, start = Listed([*dataset, *self.examples(ANCHORS)]), start // size
        sampler.set_epoch(begin["epoch"])
        sampler.start = start
        return self._loader(dataset, size if self.anchors is None else None, sampler)

    def state_dict(self) -> dict[str, Any]:
        """The progress of training: the epoch, and the rows of all ranks that were trained on in it."""
        if self.trainer is None or self.trainer.num_training_batches in (0, float("inf")):
            return {}  # nothing is trained
        done: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        epoch, batches = divmod(done.processed, int(self.trainer.num_training_batches))
        place = {"epoch": epoch, "samples": batches * self.batch_size}
        return {**place, "sha256": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader begin at a checkpoint's progress.

        Raises:
            UserError: the rows or contexts have changed since.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        self.go_on_from(state_dict)
        self._check_trained_on()
        self._begin = {name: int(state_dict.get(name, 0)) for name in ("epoch", "samples")}
        # Lightning looks for a resumable loader; here the sampler is resumable.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")

    def rows_on_each(self, ranks: int) -> int:
        """The queries of a step on each of the ranks.

        Raises:
            UserError: `batch_size` cannot be divided among them.
        """
        if self.batch_size % ranks:
            raise UserError(
                f"data.batch_size: {self.batch_size} queries a step cannot be divided among {ranks} ranks (it counts "
                f"those of all ranks); take a multiple, such as {ranks * -(-self.batch_size // ranks)}"
            )
        return self.batch_size // ranks

    def val_dataloader(self) -> DataLoader[Example]:
        """Batches of validation rows."""
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader[Example]:
        """Batches of test rows."""
        return self._held_out("test")

    def predict_dataloader(self) -> DataLoader[Example]:
        """Batches of rows to answer."""
        return self._held_out("predict")

    def _held_out(self, split: str) -> DataLoader[Example]:
        ranks = self.trainer.world_size if self.trainer else 1
        return self._loader(self.examples(split), self.eval_batch_size or max(1, self.batch_size // ranks))

    def on_before_batch_transfer(self, batch: list[Row], dataloader_idx: int) -> Batch:
        """Make a batch of a loader's rows; its workers do not send the views, which hold tokenizers."""
        return Batch(batch, self._views)

    def encode(self, examples: list[Example], epoch: int = 0) -> Batch:
        """Both views of each example, with the contexts of an epoch."""
        contexts = [self._contexts.context_for(example, epoch) for example in examples]
        return Batch.encoded(examples, contexts, self._views)

    def _check_trained_on(self) -> None:
        """Compare the data with the checkpoint's. A checkpoint of an older version has no hashes."""
        then = self._trained_on.get("sha256", {})
        if "train" not in self._examples:
            return
        if other := [name for name, value in self.fingerprint.items() if then.get(name, value) != value]:
            raise UserError(
                f"data: the {' and '.join(other)} differ from those that the checkpoint was trained on (SHA-256): a "
                "file was edited since. Restore the file, or start a new run without ckpt_path"
            )

    def _read(self, split: str, source: str | ExampleSource) -> list[Example]:
        """The rows of a source, each with the name of its teacher if there are several."""
        examples = read_examples(source, f"data.{split}", self.on_bad_row)
        if split == "predict":  # there is no teacher
            return [replace(example, teacher=None) for example in examples]
        return with_teachers(examples, self.teacher if isinstance(self.teacher, TeacherModels) else None)

    def _usable(self, examples: list[Example], key: str) -> list[Example]:
        """The rows that prompts can be made of and that the length limits keep, their own contexts cut to these."""
        checked: set[tuple[str | None, str]] = set()

        def check_row(example: Example) -> None:
            views = self._views[example.teacher]
            check = views.check_row if self._taught else views.student_prompt
            check(example)

        def check_context(example: Example) -> None:
            name, context = example.teacher, example.context
            if self._taught and context is not None and (name, context) not in checked:  # each text once
                self._views[name].check_context(context, example.source)
                checked.add((name, context))

        rows = self._passing(examples, check_row, key)
        return self._passing(self.budgets.limit_examples(rows, self.views, key), check_context, key)

    def _passing(self, examples: list[Example], check: Callable[[Example], None], key: str) -> list[Example]:
        """The rows without an error in `check`. With on_bad_row: skip, the others are left out with one warning."""
        kept, bad = [], []
        for example in examples:
            try:
                check(example)
                kept.append(example)
            except UserError as error:
                if self.on_bad_row == "raise":
                    raise
                bad.append(str(error))
        if bad:
            rank_zero_warn(f"{key}: {len(bad)} bad rows skipped (data.on_bad_row: skip), {len(kept)} kept: {bad[0]}")
        if bad and not kept:
            raise UserError(f"{key}: no row is left; the first error: {bad[0]}")
        return kept

    @cached_property
    def _contexts(self) -> ContextSource:
        return ContextSource(None if self.context is None else read_contexts(self.context), self.seed)

    def _make_views(self) -> dict[str | None, Views]:
        """Views of the student's prompts and of each teacher's, by teacher name (None: the only one)."""
        student = load_tokenizer(self.student, STUDENT)
        self._templates = [str(student.chat_template)]
        models: Mapping[Any, ModelConfig | None] = {None: self.student}
        if self._taught and self.teacher is not None:
            models = self.teacher.models if isinstance(self.teacher, TeacherModels) else {None: self.teacher}
        made = {}
        for name, model in models.items():
            config, key = model or self.student, f"{teacher_key(name)}.init_args.model"
            teacher = student if config == self.student else load_tokenizer(config, key)
            self._templates.append(str(teacher.chat_template))
            check_same_vocabulary(student, teacher, key)
            kwargs = (self.student.chat_template_kwargs, config.chat_template_kwargs)
            made[name] = Views(student, teacher, self.placement, self.template, *kwargs, (STUDENT, key, "data."))
        return made

    def _loader(
        self, dataset: Any, batch_size: int | None, sampler: "ResumableSampler | AnchoredSampler | None" = None
    ) -> DataLoader[Example]:
        """Batches of rows, encoded when they are collated: in the workers, if there are any.

        Without a batch size, the sampler gives whole batches.
        """
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=partial(_collate, self._contexts, self._views, sampler),
            worker_init_fn=one_thread,
            generator=torch.Generator(),  # each new iterator draws a seed: not from training's generator
        )


class ResumableSampler(DistributedSampler[Example]):
    """The rows of a rank, in an order that depends on seed, epoch and rank only.

    Attributes:
        start: the rows to leave out of the first epoch, because they were trained on.
    """

    start = 0

    def __iter__(self) -> Iterator[Example]:
        """Indices of an epoch. The length stays that of a full epoch, which Lightning counts by."""
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)


def _collate(
    contexts: ContextSource,
    views: Mapping[str | None, Views],
    sampler: ResumableSampler | AnchoredSampler | None,
    examples: list[Example],
) -> list[Row]:
    """Encode the rows of a batch, in the sampler's epoch (without a sampler: the first)."""
    epoch = 0 if sampler is None else sampler.epoch
    drawn = [contexts.context_for(example, epoch) for example in examples]
    return Batch.encoded(examples, drawn, views).rows


def one_thread(worker: int) -> None:
    """Keep a worker's tokenizers from starting threads; they warn of threads after a fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _refuse_overlaps(sources: dict[str, str | ExampleSource | None]) -> None:
    """Check that no split is measured on rows of another. The rows of files are unknown before they are read."""
    made = [(split, source) for split, source in sources.items() if isinstance(source, ExampleSource)]
    for (split, source), (other, other_source) in combinations(made, 2):
        if (shared := source.overlap(other_source)) is not None:
            raise UserError(f"data.{split} and data.{other} share {shared}; give each its own")


def _at_least(least: int, value: int, name: str) -> int:
    if value < least:
        raise UserError(f"data.{name} must be at least {least}, not {value}")
    return value
