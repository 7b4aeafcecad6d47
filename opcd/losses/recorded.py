"""Records of a teacher that is not loaded: its log-probabilities of a few tokens at each position."""

from dataclasses import dataclass

from torch import Tensor

from opcd.losses.log_probs import check_device, check_floating


@dataclass(frozen=True, eq=False)
class RecordedTopK:
    """The teacher's k likeliest tokens at each of N positions, with their log-probabilities.

    Raises:
        ValueError: the tensors are not both [N, k], token ids are not int64, or log-probabilities are not floating
            point or above 0.
    """

    tokens: Tensor
    """[N, k] int64 token ids; those of one position differ."""

    log_probs: Tensor
    """[N, k] in nats, over the whole vocabulary: exp of a row sums to at most 1."""

    def __post_init__(self) -> None:
        _check(
            self.tokens, self.log_probs, 2, "a record needs int64 token ids and their log-probabilities, both [N, k]"
        )
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
    """The teacher's log-probability of the sampled token at each of N positions.

    Raises:
        ValueError: the tensors are not both [N], or log-probabilities are not floating point.
    """

    tokens: Tensor
    """[N] int64: the sampled token."""

    log_probs: Tensor
    """[N] in nats: log p_T of it."""

    rollout_log_probs: Tensor | None = None
    """[N] in nats: log p of it under the policy that sampled it, for importance weights. None: the student's."""

    def __post_init__(self) -> None:
        needed = "a record of sampled tokens needs int64 token ids and their log-probabilities, both [N]"
        _check(self.tokens, self.log_probs, 1, needed)

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """The tensors [N] that go with the positions."""
        known = (self.tokens, self.log_probs)
        return known if self.rollout_log_probs is None else (*known, self.rollout_log_probs)


def _check(tokens: Tensor, log_probs: Tensor, dimensions: int, needed: str) -> None:
    check_floating(log_probs, "log_probs")
    if tokens.dim() != dimensions or tokens.shape != log_probs.shape or tokens.is_floating_point():
        given = f"tokens are {list(tokens.shape)} {tokens.dtype} and log_probs {list(log_probs.shape)}"
        raise ValueError(f"{given}; {needed}")
    check_device(tokens, "tokens", log_probs, "log_probs")
