"""The files of an experience run."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

PROMPTS = Path(__file__).with_name("prompts")
ATTEMPTS, EXTRACTIONS, VALIDATION = "attempts.jsonl", "extractions.jsonl", "validation.jsonl"
LISTS, SCORES = "lists.jsonl", "scores.jsonl"
CONTEXT, CONTEXTS, SELECTION = "context.txt", "contexts.jsonl", "selection.json"


def fingerprint(ids: Sequence[str]) -> str:
    """Compute the SHA-256 of item ids in their order."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()
