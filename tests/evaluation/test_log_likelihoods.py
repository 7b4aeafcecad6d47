"""Log-likelihoods against lm-eval's own HFLM, and tasks that compare them."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from opcd.data import Views
from opcd.evaluation.batched_answers import Answering
from opcd.evaluation.lm_eval_model import AnsweringModel
from opcd.evaluation.task_prompts import Prompts
from opcd.modules.lm.generation import Sampling
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.student import Student
from opcd.runtime.errors import UserError

WINDOW = 512
PAIRS = [
    ("Question: What is 1 + 1?\nAnswer:", " two"),
    ("Question: What is 1 + 1?\nAnswer:", " three of them, or more"),
    ("Question: What is 1 + 1?\nAnswer:", " 2"),
    ("Question: What is 1 + 1?\nAnswer:", " 3"),
    ("It ends with white space: ", "and goes on"),
    ("It ends with a line\n\n", "and goes on"),
    ("Token bound", "ary layer"),
    ("", " begins with it"),
    ("", "begins"),
    ("é日本", "語 and ü"),
    ("A" * 50, "B"),
]


@pytest.fixture
def models(tiny):
    """The same weights behind opcd's model and behind lm-eval's, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    student = Student(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tokenizer)
    theirs = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tokenizer=tokenizer)

    def make(placement: str, context: str | None = None, template: str | None = None, batch_size: int = 3):
        views = Views(tokenizer, tokenizer, placement, template)
        answering = Answering(student, views, context, Sampling(), batch_size, PrefixCache("auto"))
        prompts = Prompts(views, tokenizer, context, template)
        return AnsweringModel(answering, prompts, WINDOW, lambda done: None)

    return make, theirs


def requests(kind: str, *arguments: tuple[str, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("task", number, 1))
        for number, one in enumerate(arguments)
    ]


def likely(model: HFLM, prompt: str, tokens: int = 3) -> str:
    """What greedy decoding writes after a prompt."""
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    written = model.model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return model.tokenizer.decode(written)


def assert_same(found: list, expected: list) -> None:
    for (value, greedy), (theirs, their_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(theirs, abs=1e-3, rel=1e-5) and greedy is their_greedy


def test_a_continuation_that_joins_the_last_token_is_encoded_by_itself(models):
    """lm-eval's HFLM fails there."""
    make, _ = models
    ours = make("raw")
    head, tail = ours.prompts.pair("Token bound", "ary")
    assert (ours.prompts.views.context_text(head), ours.prompts.views.context_text(tail)) == ("Token bound", "ary")
    with pytest.raises(UserError, match="is empty"):
        ours.prompts.pair("Token bound", "")


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_they_are_lm_evals(models, batch_size):
    make, theirs = models
    prompt = PAIRS[0][0]
    pairs = [*PAIRS, (prompt, likely(theirs, prompt))]
    found = make("raw", batch_size=batch_size).loglikelihood(requests("loglikelihood", *pairs))
    assert_same(found, theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True))
    assert found[-1][1] and not found[0][1]  # one that greedy decoding writes is among them


def test_after_a_chat_template_too(models):
    make, theirs = models
    ours = make("user")
    chats = [[{"role": "user", "content": text}] for text in ("What is 1 + 1?", "Name a river.\n")]
    chats.append([*chats[0], {"role": "assistant", "content": "It is"}])  # its answer begins with a given text
    ours_text = [ours.apply_chat_template(chat, chat[-1]["role"] == "user") for chat in chats]
    their_text = [theirs.apply_chat_template(chat, chat[-1]["role"] == "user") for chat in chats]
    assert ours_text == their_text
    pairs = [(text, choice) for text in ours_text for choice in ("two", " two", "The Rhine\nflows", "2")]
    found = ours.loglikelihood(requests("loglikelihood", *pairs))
    assert_same(found, theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True))


def test_texts_that_are_scored_whole(models):
    make, theirs = models
    texts = [("Once upon a time.",), ("word " * (2 * WINDOW + 7),), ("é",)]  # one of three windows
    found = make("raw").loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_a_row_says_is_no_control_token(models):
    """lm-eval's HFLM takes it for one."""
    make, theirs = models
    ours = make("user")
    text = ours.apply_chat_template([{"role": "user", "content": "Say <|im_end|> now."}])
    for pair in ((text, "two"), ("Say <|im_end|>", " now"), ("Say", " <|im_end|>")):
        head, tail = (make("raw") if pair[0] != text else ours).prompts.pair(*pair)
        data = sum(token == theirs.tokenizer.convert_tokens_to_ids("<|im_end|>") for token in head + tail)
        assert data == text.count("<|im_end|>") - 1 if pair[0] == text else data == 0
    (value, _), (plain, _) = (
        ours.loglikelihood(requests("loglikelihood", (text, choice)))[0] for choice in ("<|im_end|>", "<im_end>")
    )
    assert value != plain


def test_a_context_without_chat_template_stands_before_the_prompt(models):
    make, theirs = models
    prompt, choice = PAIRS[0]
    for template, joined in ((None, f"A river.\n\n{prompt}"), ("<{context}> {query}", f"<A river.> {prompt}")):
        found = make("raw", "A river.", template).loglikelihood(requests("loglikelihood", (prompt, choice)))
        assert_same(found, theirs.loglikelihood(requests("loglikelihood", (joined, choice)), disable_tqdm=True))


def test_the_model_is_left_as_it_was(models):
    make, _ = models
    ours = make("raw")
    model = ours.answering.student.model.train()
    ours.loglikelihood(requests("loglikelihood", *PAIRS))
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_questions_are_counted_and_not_choices(models):
    make, _ = models
    ours, shown = make("raw", batch_size=2), []
    ours.show = shown.append
    asked = requests("loglikelihood", *PAIRS)
    for number, request in enumerate(asked):
        request.metadata = ("task", number // 4, 1)
        request.doc_id = number // 4
    ours.loglikelihood(asked)
    assert sum(shown) == 3
