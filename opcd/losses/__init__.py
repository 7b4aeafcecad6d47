"""Divergences between a student's and a teacher's next-token distributions, in pure PyTorch, for any trainer.

The values are unreduced, in nats and computed in float32. The gradient goes to the student only.

Examples:
    >>> import torch
    >>> from opcd.losses import JSD, ReverseKL, TopK, chunked_divergence
    >>> student_logits, teacher_logits = torch.randn(2, 5, 1000), torch.randn(2, 5, 1000)    # [..., V]
    >>> ReverseKL()(student_logits, teacher_logits).shape                                    # [...]: nats per position
    torch.Size([2, 5])
    >>> TopK(JSD(beta=0.5), k=256, support="student", tail="bucket")(student_logits, teacher_logits).shape
    torch.Size([2, 5])
    >>> student_hidden, student_head = torch.randn(10, 16), torch.randn(1000, 16)            # [N, H_s], [V, H_s]
    >>> teacher_hidden, teacher_head = torch.randn(10, 32), torch.randn(1000, 32)            # [N, H_t], [V, H_t]
    >>> chunked_divergence(ReverseKL(), student_hidden, student_head, teacher_hidden, teacher_head).shape
    torch.Size([10])
"""

from opcd.losses import functional
from opcd.losses.chunking import chunked
from opcd.losses.divergences import JSD, Divergence, ForwardKL, Loss, Mixture, ReverseKL, SkewKL, SkewReverseKL
from opcd.losses.from_hidden import chunked_divergence
from opcd.losses.functional import clip_nats, entropy, retained_mass, top1_agreement
from opcd.losses.head import Head, as_head
from opcd.losses.recorded import RecordedTokens, RecordedTopK
from opcd.losses.sampled import SampledReverseKL, sampled_reverse_kl
from opcd.losses.topk import TopK

__all__ = [
    "JSD",
    "Divergence",
    "ForwardKL",
    "Head",
    "Loss",
    "Mixture",
    "RecordedTokens",
    "RecordedTopK",
    "ReverseKL",
    "SampledReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TopK",
    "as_head",
    "chunked",
    "chunked_divergence",
    "clip_nats",
    "entropy",
    "functional",
    "retained_mass",
    "sampled_reverse_kl",
    "top1_agreement",
]
