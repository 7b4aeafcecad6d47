"""The experience loop of on-policy context distillation (arXiv:2602.12275): solve, extract, accumulate, select.

How it works:
1. solve: the model attempts training items, without lessons: `lists` lists x `steps` items, a new item each step.
2. extract: a model reads each attempt, and writes general lessons on marked lines. It never sees a reference answer.
3. accumulate: the lessons are added to each list, step by step; over the limit of tokens the oldest are dropped.
4. select: validation items are attempted with the lists in the prompt. Score k is that of the list after step k. The
   best list is the context of the distillation.

The answers of a batch are on the disk before the next batch begins, and are never computed again.
"""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from opcd.experience.experience_config import Experience, StageName
from opcd.experience.experience_folder import (
    ATTEMPTS,
    CONTEXT,
    CONTEXTS,
    EXTRACTIONS,
    LISTS,
    SCORES,
    SELECTION,
    VALIDATION,
)
from opcd.experience.lessons import Growth, LessonList, read_lessons
from opcd.experience.problems import Attempt
from opcd.experience.selection import Score, best, best_of_each, to_score
from opcd.experience.writers import Writers
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import write_atomic
from opcd.writing.claimed_folder import write_records
from opcd.writing.journal import Journal, Record
from opcd.writing.prompt_files import Prompt
from opcd.writing.stage_progress import progress

Place = tuple[int, int]
"""(number of a list from 0, step from 1)."""


class Loop:
    """One pass of the loop in one folder.

    Args:
        config: the run.
        prompts: the prompts `extract` and `context`.
        growth: the rules by which lists grow.
        writers: the models.
        folder: the folder of all files.
        round_number: the number of the loop's round; other rounds draw other items and tokens.
    """

    def __init__(
        self,
        config: Experience,
        prompts: dict[str, Prompt],
        growth: Growth,
        writers: Writers,
        folder: Path,
        round_number: int = 0,
    ) -> None:
        self.config, self.prompts, self.growth, self.writers, self.folder = config, prompts, growth, writers, folder
        self._round = round_number
        folder.mkdir(parents=True, exist_ok=True)
        self._items = config.problems.validation()
        self._validation = Journal(folder / VALIDATION, keep=("model", "id", "item", "success"))
        self._successes: defaultdict[tuple[str, str | None], list[bool]] = defaultdict(list)
        self._note(self._validation.records)

    def run(self) -> Score:
        """Run all stages; return the score of the selected list.

        Raises:
            UserError: no lesson was written, or none fits into a list.
        """
        return self.select(self.accumulate(self.extract(self.solve())))

    def solve(self) -> dict[Place, Attempt]:
        """Attempt the item of each place, without lessons."""
        journal, stage = Journal(self.folder / ATTEMPTS), self.config.solve
        plan = [(place, item) for place, item in self._drawn_items().items()]
        done = {_place(record) for record in journal.records}
        with progress("solve", len(plan), len(done)) as advance:
            for batch in _batches(plan, stage.batch_size):
                if batch[0][0] in done:
                    continue
                tried = self._attempt("solve", str(batch[0][0]), [item for _, item in batch], None)
                places = [{"list": place[0], "step": place[1]} for place, _ in batch]
                journal.append([place | asdict(attempt) for place, attempt in zip(places, tried, strict=True)])
                advance(len(batch))
        kept = [field.name for field in fields(Attempt)]
        return {_place(record): Attempt(**{name: record[name] for name in kept}) for record in journal.records}

    def extract(self, attempts: dict[Place, Attempt]) -> dict[Place, list[str]]:
        """Extract the lessons of each attempt.

        Raises:
            UserError: no answer holds a marked line.
        """
        journal, stage = Journal(self.folder / EXTRACTIONS), self.config.extract
        found = {_place(record): record["lessons"] for record in journal.records}
        lists = {number: LessonList(number) for number in range(self.config.lists)}
        with progress("extract", len(attempts), len(found)) as advance:
            for places in self._groups(attempts):
                for batch in _batches(places, stage.batch_size):
                    if batch[0] in found:
                        continue
                    records = self._extract_batch(batch, attempts, lists)
                    journal.append(records)
                    found |= {_place(record): record["lessons"] for record in records}
                    advance(len(batch))
                if stage.show_earlier:
                    lists |= {number: self.growth(lists[number], found[number, step]) for number, step in places}
        self._check_found(journal.records)
        return found

    def accumulate(self, found: dict[Place, list[str]]) -> list[LessonList]:
        """Make every list as it is after every step.

        Raises:
            UserError: every lesson is over the limit of tokens.
        """
        versions = []
        for number in range(self.config.lists):
            version = LessonList(number)
            for step in range(1, self.config.steps + 1):
                version = self.growth(version, found[number, step])
                versions.append(version)
        write_records(self.folder / LISTS, [version.record() for version in versions])
        if not any(version.lessons for version in versions):
            longest = next(lesson for version in versions for lesson in version.too_long)
            raise UserError(
                f"lessons.max_tokens: no lesson fits into {self.growth.max_tokens} tokens, so every list is "
                f"empty; raise it. One of them: {longest[:200]!r}"
            )
        return versions

    def select(self, versions: Sequence[LessonList]) -> Score:
        """Score the lists on the validation items, and write the best one as a context."""
        chosen = to_score(versions, self.config.select.every)
        texts = {version.id: version.text for version in chosen}
        with progress("select", (len(texts) + 1) * len(self._items)) as advance:
            found = {key: self._measure("select", key, texts.get(key), advance) for key in [None, *texts]}
        scores = [Score.of(None, found[None]), *(Score.of(version, found[version.id]) for version in chosen)]
        selected = best(scores)
        write_records(self.folder / SCORES, [asdict(score) for score in scores])
        write_records(self.folder / CONTEXTS, [{"context": texts[score.id]} for score in best_of_each(scores)])
        write_atomic(self.folder / CONTEXT, str(texts[selected.id]) + "\n")
        without = {f"{name}_without": getattr(scores[0], name) for name in ("right", "success", "low", "high")}
        # The last file: if it is there, all of them are.
        write_atomic(self.folder / SELECTION, json.dumps(asdict(selected) | without, indent=1) + "\n")
        return selected

    def score_without(self, stage: StageName) -> Score:
        """Measure the success of a stage's model on the validation items, without a list."""
        with progress(f"{stage} without lessons", len(self._items)) as advance:
            return Score.of(None, self._measure(stage, None, None, advance))

    def _measure(
        self, stage: StageName, list_id: str | None, context: str | None, advance: Callable[[int], None]
    ) -> list[bool]:
        """The success at each validation item with a list in the prompt, from the journal as far as it is there."""
        model = self.config.model_of(stage)[1]
        known = self._successes[model, list_id]
        advance(len(known))
        for batch in _batches(self._items[len(known) :], self.config.select.batch_size):
            tried = self._attempt(stage, f"{list_id}/{batch[0]}", batch, context)
            if unknown := [attempt.item for attempt in tried if attempt.success is None]:
                raise UserError(f"problems: validation item {unknown[0]} cannot be judged, so no list can be selected")
            records = [{"model": model, "id": list_id, **asdict(attempt)} for attempt in tried]
            self._validation.append(records)
            self._note(records)
            advance(len(batch))
        return known

    def _note(self, records: Sequence[Record]) -> None:
        for record in records:
            self._successes[record["model"], record["id"]].append(record["success"])

    def _attempt(self, stage: StageName, unit: str, items: Sequence[str], context: str | None) -> list[Attempt]:
        writer = self.writers.open(stage)
        self._seed("select" if stage == "student" else stage, unit)
        return self.config.problems.attempt(items, writer, context)

    def _extract_batch(
        self, places: Sequence[Place], attempts: dict[Place, Attempt], lists: dict[int, LessonList]
    ) -> list[Record]:
        """Ask the extractor about the attempts of a batch, and read the lessons in its answers."""
        stage = self.config.extract
        prompts = [
            self.prompts["extract"](
                transcript=attempts[place].transcript,
                outcome=attempts[place].outcome if stage.show_outcome else None,
                lessons=list(lists[place[0]].lessons) if stage.show_earlier else [],
                marker=stage.marker,
            )
            for place in places
        ]
        writer = self.writers.open("extract")
        self._seed("extract", str(places[0]))
        answers = writer.write([[{"role": "user", "content": prompt}] for prompt in prompts])
        records = []
        for place, written in zip(places, answers, strict=True):
            text = written.text.rpartition("\n")[0] if written.cut_off else written.text  # whole lines only
            found = {"item": attempts[place].item, "lessons": read_lessons(text, stage.marker)}
            records.append({"list": place[0], "step": place[1], **found, **asdict(written)})
        return records

    def _groups(self, attempts: Iterable[Place]) -> list[list[Place]]:
        """Places that do not depend on each other: all, or, where earlier lessons are shown, those of one step."""
        places = list(attempts)
        if not self.config.extract.show_earlier:
            return [places]
        return [[place for place in places if place[1] == step] for step in range(1, self.config.steps + 1)]

    def _drawn_items(self) -> dict[Place, str]:
        """The item of each place, by steps; a list has no item twice."""
        config = self.config
        items = config.problems.training()
        orders = [
            random.Random(f"{config.seed}/{self._round}/{number}").sample(items, config.steps)
            for number in range(config.lists)
        ]
        return {(n, step): orders[n][step - 1] for step in range(1, config.steps + 1) for n in range(config.lists)}

    def _seed(self, stage: str, unit: str) -> None:
        """Seed the draws of a batch, so that they do not depend on earlier batches: a run may resume with any batch."""
        name = f"{self.config.seed}/{self._round}/{stage}/{unit}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))

    def _check_found(self, records: Sequence[Record]) -> None:
        """Raise UserError where no answer holds a marked line."""
        if any(record["lessons"] for record in records):
            return
        samples = "\n".join(f"    {record['text'][:300]!r}" for record in records[:2])
        cut = sum(record["cut_off"] for record in records)
        raise UserError(
            f"no lessons: none of the {len(records)} answers of the extractor has a line that begins with "
            f"{self.config.extract.marker!r} ({cut} were cut off by extract.sampling.max_new_tokens). Two of them:\n"
            f"{samples}\n"
            f"Take a stronger model (extract.model.name), another prompt (extract.prompt), or more tokens, and another "
            f"--out; all answers are in {self.folder / EXTRACTIONS}"
        )


def _place(record: Record) -> Place:
    return record["list"], record["step"]


def _batches(plan: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (plan[start : start + size] for start in range(0, len(plan), size))
