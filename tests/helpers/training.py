"""One training step, its gradients, and the loss and the greedy response by their definitions."""

from functools import partial

import torch
from lightning import Callback, Trainer

RESPONSES = [
    "It is two.",
    "Yes, of course I know that: four!",
    "Six",
    "8",
    "Ten, I think.",
    "12 it is",
    "Well",
    "Sixteen.",
]


def trainer(tmp_path, steps=1, accelerator="cpu", **options):
    """A trainer that writes and shows nothing; on the CPU, where a test holds models or tensors of its own there."""
    return Trainer(
        max_steps=steps,
        accelerator=accelerator,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )


class KeepGradients(Callback):
    """Keeps what the optimizer gets; `of` makes it change no weight."""

    def __init__(self):
        self.found = {}

    @classmethod
    def of(cls, distiller):
        distiller.gradient_clip_val, distiller.optimizer = None, partial(torch.optim.SGD, lr=0.0)
        return cls()

    def on_before_optimizer_step(self, trainer, distiller, optimizer):
        self.found = {name: p.grad.to("cpu", copy=True) for name, p in distiller.student.named_parameters()}


def gradients(tmp_path, data, distiller, **options):
    """The gradients of one step on the CPU, as they are when the optimizer would use them."""
    kept = KeepGradients.of(distiller)
    run = trainer(tmp_path, steps=-1, max_epochs=1, limit_train_batches=1, callbacks=[kept], **options)
    run.fit(distiller, datamodule=data)
    return kept.found


def relative_difference(one, other):
    """Norm of the difference over the norm, of all weights together."""
    difference = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return (difference / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


def dense_reference(student, teacher, trajectories, divergence, reduction):
    """The loss from whole rows, dense float64 log-softmax and a plain loop: the definition."""
    per_response = []
    for row in range(len(trajectories)):
        response = trajectories.responses[row]
        logits = []
        for model, prompts in ((student, trajectories.student_prompts), (teacher, trajectories.teacher_prompts)):
            whole = torch.cat([prompts[row], response])[None]
            logits.append(model(whole).logits[0, len(prompts[row]) - 1 : -1].double().log_softmax(-1))
        ours, theirs = logits[0], logits[1].detach()
        p, q = (ours, theirs) if divergence == "reverse" else (theirs, ours)
        per_response.append((p.exp() * (p - q)).sum(-1))
    if reduction == "token":
        return torch.cat(per_response).mean()
    return torch.stack([values.mean() for values in per_response]).mean()


def greedily(model, prompt, steps):
    """The likeliest continuation, one whole pass a token."""
    ids = prompt
    for _ in range(steps):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids[len(prompt) :].tolist()
