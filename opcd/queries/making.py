"""From a context to questions about it.

How it works:
    1. documents are cut into chunks that fit a prompt, and chunks into parts: sentences and list items
    2. round by round, the model writes one question about every part, each round of another kind; a round is shown what
       was asked about the part before. For a manner, a part is a topic, and a round draws other personas
    3. rules over the text drop what cannot be used: duplicates, "according to the text", cut off, ...
    4. the model answers each question that is left with and without the context: a question whose answer the context
       does not change, or that is answered in two ways, is dropped
    5. parts are held out as a whole for validation; the rest is for training

Ideas: Cartridges' self-study (arXiv:2506.06266), Doc-to-LoRA, synthetic-data-kit. Filter 4 is the divergence that
training minimises, before training.
"""

import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opcd.queries import filters
from opcd.queries.askers import Asker, Tried
from opcd.queries.parts import Chunk, Part
from opcd.runtime.errors import UserError
from opcd.tasks.matching import holds
from opcd.writing.journal import Journal
from opcd.writing.prompt_files import Prompt
from opcd.writing.stage_progress import progress

Kind = Literal["facts", "manner"]
PROMPTS = Path(__file__).with_name("prompts")
FACT_KINDS = ("direct", "reworded", "reversed", "use", "combined")
"""What a round asks for; the later rounds begin again."""
NAMES = {"passage", "text", "subject", "other", "persona", "topic", "earlier"}
"""What a prompt may use."""
NEEDED = {"manner": {"passage", "persona", "topic"}, "combined": {"passage", "text", "other"}}
TURN = "\n---\n"
"""Stands between the turns of a prompt: examples of the user's and the assistant's, then the user's own."""
MOST_ROUNDS = 10
WARMER = 0.1
"""By how much each round draws at a higher temperature than the one before, up to 1."""
BATCH = 16
"""Questions that are written at once."""
AGREE = 0.4
"""Likeness of two answers with the context from which they agree, where no name or number can be compared."""
ADDRESSED = re.compile(
    r"\b(you|your|yours)\b|^(always|never|do not|don't|use|write|answer|begin|end|keep|be|avoid)\b", re.I
)


@dataclass(frozen=True)
class Plan:
    """What is to be made.

    Attributes:
        kind: whether the context holds facts, or a manner to answer in.
        train: rows to train on; None: three for each part.
        val: rows to hold out.
        seed: of all draws.
        temperature: of the first round; each later one draws at `WARMER` more.
        prompts: a folder of files that replace those of `opcd/queries/prompts`; None: the package's.
    """

    kind: Kind
    train: int | None = None
    val: int = 16
    seed: int = 0
    temperature: float = 0.3
    prompts: Path | None = None


@dataclass
class Request:
    """A question that is to be written."""

    number: int
    part: Part
    kind: str
    earlier: list[str] = field(default_factory=list)


def kind_of(text: str) -> Kind:
    """Whether a context holds facts or a manner: a manner addresses who answers in many of its sentences."""
    sentences = [sentence for sentence in re.split(r"(?<=[.!?:])\s+|\n+", text) if len(sentence.split()) > 2]
    addressed = sum(ADDRESSED.search(sentence.strip(" -*")) is not None for sentence in sentences)
    return "manner" if sentences and addressed / len(sentences) >= 0.4 else "facts"


class Maker:
    """Makes questions, and keeps what was done in a journal: a killed command resumes.

    Args:
        asker: the model.
        chunks: of the context.
        plan: what is to be made.
        journal: of the folder.
    """

    def __init__(self, asker: Asker, chunks: Sequence[Chunk], plan: Plan, journal: Journal) -> None:
        self.asker, self.chunks, self.plan, self.journal = asker, chunks, plan, journal
        self.personas, self.topics = (_lines(plan, name) for name in ("personas.txt", "topics.txt"))
        kinds = ("manner",) if plan.kind == "manner" else FACT_KINDS
        self.prompts = {kind: _prompt(plan, kind) for kind in kinds}
        self.all_parts = [part for chunk in chunks for part in chunk.parts] if plan.kind == "facts" else self._topics()
        if not self.all_parts:
            raise UserError("--context: no sentence to ask about; give a text of sentences or a list")
        self.parts = self._sampled()

    @property
    def prompt_texts(self) -> dict[str, str]:
        """What the prompts are made from, for those who compare two runs."""
        lists = {"personas": "\n".join(self.personas), "topics": "\n".join(self.topics)}
        return {kind: prompt.text for kind, prompt in self.prompts.items()} | lists

    def prompts_of_a_round(self) -> list[str]:
        """The prompts of the first round."""
        kind = next(iter(self.prompts))
        requests = (Request(number, part, kind) for number, part in enumerate(self.parts))
        return ["\n".join(turn["content"] for turn in self.conversation(request)) for request in requests]

    @property
    def kept(self) -> list[dict[str, Any]]:
        """The records of the questions that passed every filter."""
        return [record for record in self.journal.records if record["dropped"] is None]

    def run(self) -> None:
        """Write and try out questions until a round ends with enough, or the rounds are over."""
        wanted = (self.plan.train or 3 * len(self.parts)) + self.plan.val
        with progress("questions", wanted, min(len(self.kept), wanted)) as advance:
            for batch in self._batches():
                # A round is finished: else nothing would be asked about the end of the context.
                begins = batch[0].number % len(self.parts) == 0
                if self._is_exhausted() or (begins and len(self.kept) >= wanted):
                    return
                records, before = self._made(batch), len(self.kept)
                self.journal.append(records)
                advance(min(len(self.kept), wanted) - min(before, wanted))

    def conversation(self, request: Request) -> list[dict[str, str]]:
        """The prompt of a request."""
        part, random_ = request.part, random.Random(f"{self.plan.seed}/{request.number}")
        others = [other.text for other in self.all_parts if other.chunk == part.chunk and other is not part]
        text = self.prompts[request.kind](
            passage=part.passage,
            text=part.text,
            subject=part.subject,
            other=random_.choice(others) if others else part.text,
            persona=random_.choice(self.personas),
            topic=part.text,
            earlier=request.earlier,
        )
        turns = [turn.strip() for turn in text.split(TURN)]
        if len(turns) % 2 == 0:
            raise UserError(
                f"--prompts: {request.kind}.txt must end with the user's turn; turns alternate, split by ---"
            )
        return [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]

    def _batches(self) -> Iterator[list[Request]]:
        """What is still to be asked: whole batches, each after the one before is in the journal."""
        kinds = list(self.prompts)
        for number in range(MOST_ROUNDS):
            kind, first = kinds[number % len(kinds)], number * len(self.parts)
            for start in range(0, len(self.parts), BATCH):
                requests = [
                    Request(first + place, part, kind, self._earlier(part))
                    for place, part in enumerate(self.parts[start : start + BATCH], start=start)
                ]
                if requests[-1].number >= len(self.journal.records):
                    yield requests

    def _is_exhausted(self) -> bool:
        """Whether the last round of all kinds gave nothing new."""
        last = self.journal.records[-len(self.parts) * len(self.prompts) :]
        return len(last) == len(self.parts) * len(self.prompts) and all(record["dropped"] for record in last)

    def _earlier(self, part: Part) -> list[str]:
        asked = [record["query"] for record in self.journal.records if record["part"] == part.name]
        return [query for query in dict.fromkeys(asked) if query][-4:]

    def _made(self, requests: list[Request]) -> list[dict[str, Any]]:
        """The records of a batch of requests: the question, why it was dropped, and its answers."""
        seed, began = self.plan.seed * 1_000_003 + requests[0].number, time.perf_counter()
        temperature = min(1.0, self.plan.temperature + WARMER * (requests[0].number // len(self.parts)))
        written = self.asker.write([self.conversation(request) for request in requests], seed, temperature)
        known, records = [record["query"] for record in self.kept], []
        for request, said in zip(requests, written, strict=True):
            query = filters.cleaned(said.text)
            part, about = request.part, None
            if self.plan.kind == "facts":
                about = filters.names(f"{part.subject} {part.passage}", self.chunks[part.chunk].text)
            dropped = filters.flaw(query, said.text, said.cut_off, about)
            dropped = dropped or filters.repeats(query, known)
            if dropped is None:
                known.append(query)
            record = {"part": part.name, "chunk": part.chunk, "kind": request.kind, "query": query}
            records.append({**record, "dropped": dropped, "tokens": said.tokens})
        self._try_out(requests, records, seed)
        seconds = (time.perf_counter() - began) / len(records)
        return [{**record, "seconds": round(seconds, 3)} for record in records]

    def _try_out(self, requests: list[Request], records: list[dict[str, Any]], seed: int) -> None:
        """Answer what passed the rules, chunk by chunk, and note what the answers say."""
        for chunk in sorted({request.part.chunk for request in requests}):
            rows = [n for n, record in enumerate(records) if record["dropped"] is None and record["chunk"] == chunk]
            if not rows:
                continue
            context = self.chunks[chunk].text
            tried = self.asker.try_out([records[row]["query"] for row in rows], context, seed)
            for row, one in zip(rows, tried, strict=True):
                reference = filters.reference(records[row]["query"], one.answer, requests[row].part.passage)
                records[row] |= {
                    "dropped": self._fails(records[row]["query"], one, reference, context),
                    "reference": reference if self.plan.kind == "facts" else None,
                    "answer": one.answer,
                    "effect": round(one.effect, 4),
                }

    def _fails(self, query: str, tried: Tried, reference: str | None, context: str) -> str | None:
        """Why the answers speak against a question."""
        if tried.effect < self.asker.least_effect:
            return "the context does not change the answer"
        if self.plan.kind == "manner":
            return None
        if not filters.says_something_new(query, tried.answer, context):
            return "gives the answer away, or has none in the context"
        same = reference is not None and holds(tried.second, reference)
        if not same and filters.likeness(tried.answer, tried.second) < AGREE:
            return "two answers with the context disagree"
        return None

    def _sampled(self) -> list[Part]:
        """The parts to ask about: of many more than the questions that are wanted, a sample."""
        most = len(self.all_parts) if self.plan.train is None else 2 * (self.plan.train + self.plan.val)
        if len(self.all_parts) <= most:
            return self.all_parts
        drawn = random.Random(self.plan.seed).sample(range(len(self.all_parts)), most)
        return [self.all_parts[number] for number in sorted(drawn)]

    def _topics(self) -> list[Part]:
        """A manner is asked about by topics, under its whole text."""
        if len(self.chunks) > 1:
            raise UserError(
                "--kind manner: the context does not fit into one chunk; raise --chunk_tokens, or shorten it"
            )
        text = self.chunks[0].text
        return [Part(f"topic/{n}", 0, "", text, topic) for n, topic in enumerate(self.topics, start=1)]


@dataclass(frozen=True)
class Rows:
    """What comes out: rows for `opcd fit`, and their report."""

    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    report: dict[str, Any]


def rows(maker: Maker) -> Rows:
    """Split the questions that were kept: whole parts are held out, drawn by the seed.

    Raises:
        UserError: there are none, or none to train on.
    """
    kept, plan = maker.kept, maker.plan
    if not kept:
        raise UserError(f"--context: none of {len(maker.journal.records)} questions was kept: {_why(maker)}")
    parts = list(dict.fromkeys(record["part"] for record in kept))
    random.Random(plan.seed).shuffle(parts)
    held_out: set[str] = set()
    by_part = Counter(record["part"] for record in kept)
    while plan.val and parts and sum(by_part[part] for part in held_out) < plan.val:
        held_out.add(parts.pop())
    train = _spread([record for record in kept if record["part"] not in held_out], plan)
    val = [record for record in kept if record["part"] in held_out][: plan.val]
    if not train:
        raise UserError(
            f"--val {plan.val}: nothing is left to train on, for {len(kept)} questions were kept; lower --val "
            f"(dropped: {_why(maker)})"
        )
    several = len(maker.chunks) > 1
    of_train, of_val = ([_row(record, maker, several) for record in records] for records in (train, val))
    return Rows(of_train, of_val, _report(maker, train, val))


def _spread(records: list[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """As many of the records as are wanted, about as many parts as possible."""
    if plan.train is None or len(records) <= plan.train:
        return records
    asked: Counter[str] = Counter()
    place = []  # of a question among those about its part
    for record in records:
        place.append(asked[record["part"]])
        asked[record["part"]] += 1
    order = list(range(len(records)))
    random.Random(plan.seed).shuffle(order)
    return [records[number] for number in sorted(sorted(order, key=place.__getitem__)[: plan.train])]


def _row(record: dict[str, Any], maker: Maker, several: bool) -> dict[str, Any]:
    """A row as `opcd fit` reads it; of a context in several chunks, with its own."""
    row = {"query": record["query"]}
    if record.get("reference"):
        row["reference"] = record["reference"]
    if several:
        row["context"] = maker.chunks[record["chunk"]].text
    return row | {"part": record["part"]}


def _report(maker: Maker, train: Sequence[dict[str, Any]], val: Sequence[dict[str, Any]]) -> dict[str, Any]:
    records = maker.journal.records
    dropped = [record for record in records if record["dropped"] is not None]
    samples: dict[str, list[str]] = {}
    for record in dropped:
        samples.setdefault(record["dropped"], []).append(record["query"])
    asked = Counter(part.chunk for part in maker.all_parts)
    covered = Counter(chunk for chunk, _ in {(record["chunk"], record["part"]) for record in maker.kept})
    return {
        "model": maker.asker.name,
        "kind": maker.plan.kind,
        "seed": maker.plan.seed,
        "wanted": maker.plan.train,
        "asked": len(records),
        "kept": len(maker.kept),
        "train": len(train),
        "val": len(val),
        "dropped": dict(Counter(record["dropped"] for record in dropped).most_common()),
        "samples_of_dropped": {why: queries[:2] for why, queries in samples.items()},
        "kept_by_kind": dict(Counter(record["kind"] for record in maker.kept)),
        "coverage_by_chunk": {str(chunk + 1): f"{covered[chunk]} of {asked[chunk]} parts" for chunk in sorted(asked)},
        "mean_effect": round(sum(record["effect"] for record in maker.kept) / max(1, len(maker.kept)), 4),
        "tokens": sum(record["tokens"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records), 1),
    }


def _why(maker: Maker) -> str:
    """The filters with their counts, and two samples."""
    dropped = [record for record in maker.journal.records if record["dropped"] is not None]
    counts = ", ".join(f"{why} {n}" for why, n in Counter(record["dropped"] for record in dropped).most_common())
    samples = "; ".join(repr(record["query"][:100]) for record in dropped[:2])
    return f"{counts or 'nothing was asked'}" + (f" (such as {samples})" if samples else "")


def _prompt(plan: Plan, kind: str) -> Prompt:
    own = None if plan.prompts is None else plan.prompts / f"{kind}.txt"
    file = str(own) if own is not None and own.is_file() else None
    return Prompt(PROMPTS / f"{kind}.txt", file, "--prompts", NAMES, NEEDED.get(kind, {"passage", "text"}))


def _lines(plan: Plan, name: str) -> list[str]:
    own = None if plan.prompts is None else plan.prompts / name
    path = own if own is not None and own.is_file() else PROMPTS / name
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise UserError(f"--prompts: {path} has no lines")
    return found
