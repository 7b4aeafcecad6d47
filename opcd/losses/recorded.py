"""A teacher that is no longer there, or far away: what it said of each position."""

from dataclasses import dataclass

from torch import Tensor

from opcd.losses._validation import check_device, check_floating


@dataclass(frozen=True, eq=False)
class RecordedTopK:
    """The teacher's k likeliest tokens at each of N positions, with their log-probabilities; unknown beyond them.

    Raises:
        ValueError: for tensors that are not both [N, k], token ids that are not int64, or log-probabilities that are
            not floating point or above 0.
    """

    tokens: Tensor
    """[N, k] int64 token ids; those of one position differ."""

    log_probs: Tensor
    """[N, k] in nats, out of the whole vocabulary: exp of a row sums to at most 1."""

    def __post_init__(self) -> None:
        check_floating(self.log_probs, "log_probs")
        if self.tokens.dim() != 2 or self.tokens.shape != self.log_probs.shape or self.tokens.is_floating_point():
            raise ValueError(
                f"tokens are {list(self.tokens.shape)} {self.tokens.dtype} and log_probs {list(self.log_probs.shape)}; "
                "a record needs int64 token ids and their log-probabilities, both [N, k]"
            )
        check_device(self.tokens, "tokens", self.log_probs, "log_probs")
        if bool((self.log_probs > 1e-3).any()):
            raise ValueError(
                f"log_probs go up to {float(self.log_probs.max()):.3g}; log-probabilities are at most 0: give log "
                "softmax over the whole vocabulary, not logits or probabilities"
            )

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """The tensors [N, ...] that go with the positions."""
        return self.tokens, self.log_probs


@dataclass(frozen=True, eq=False)
class RecordedTokens:
    """The teacher's log-probability of the sampled token at each of N positions, and of no other token.

    Raises:
        ValueError: for tensors that are not both [N], or log-probabilities that are not floating point.
    """

    tokens: Tensor
    """[N] int64: the token that was sampled."""

    log_probs: Tensor
    """[N] in nats: log p_T of it."""

    rollout_log_probs: Tensor | None = None
    """[N] in nats: log p of it under the policy that sampled it, for importance weights; None: the student's own."""

    def __post_init__(self) -> None:
        check_floating(self.log_probs, "log_probs")
        if self.tokens.dim() != 1 or self.tokens.shape != self.log_probs.shape or self.tokens.is_floating_point():
            raise ValueError(
                f"tokens are {list(self.tokens.shape)} {self.tokens.dtype} and log_probs {list(self.log_probs.shape)}; "
                "a record of sampled tokens needs int64 token ids and their log-probabilities, both [N]"
            )
        check_device(self.tokens, "tokens", self.log_probs, "log_probs")

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """The tensors [N] that go with the positions."""
        known = (self.tokens, self.log_probs)
        return known if self.rollout_log_probs is None else (*known, self.rollout_log_probs)
