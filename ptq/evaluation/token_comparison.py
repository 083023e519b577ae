"""Two models on the same tokens: a figure or two of each for every token, and no logits that outlive their chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import log_softmax

from quantize.kernels.matmul import fast_linears

TOGETHER = 1 << 19
"""Values of logits that are looked at together on a CPU: 2 MiB."""
Head = Callable[[torch.Tensor], torch.Tensor]
Remembered = Callable[[tuple[int, int], Callable[[], torch.Tensor]], torch.Tensor]
"""Returns the baseline's log-probabilities of the chunk of a window that begins at a token: computed now, or remembered."""


def computed_now(place: tuple[int, int], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Remembers nothing."""
    return compute()


@dataclass(frozen=True)
class TokenComparison:
    """Baseline and quantized model, target by target, on the CPU.

    Attributes:
        losses: the quantized model's mean loss of every window, nats a target, float64 (windows,).
        baseline: the baseline's loss at every target, nats, float64 (tokens,).
        quantized: the quantized model's, float64 (tokens,).
        kl: KL(baseline || quantized) of the next-token distributions, nats, float64 (tokens,).
        same_top: whether both find the same token the most likely, bool (tokens,).
    """

    losses: torch.Tensor
    baseline: torch.Tensor
    quantized: torch.Tensor
    kl: torch.Tensor
    same_top: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Returns the figures in the order of the attributes, for tokens of other windows to be put beside them."""
        return self.losses, self.baseline, self.quantized, self.kl, self.same_top

    @property
    def agreement(self) -> float:
        """The share of tokens at which both find the same token the most likely."""
        return float(self.same_top.double().mean())


def window_losses(
    head: Head,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    chunk: int,
    remembered: Remembered = computed_now,
) -> torch.Tensor:
    """Returns the mean next-token cross-entropy of every window, float64 (windows,).

    Args:
        head: final hidden states (1, tokens, channels) to logits (1, tokens, vocabulary).
        hidden: final hidden states (windows, length, channels).
        ids: token ids (windows, length).
        chunk: tokens whose logits exist at the same time.
        remembered: may keep the log-probabilities of chunks, for `compare_tokens`.
    """
    losses = torch.empty(len(ids), dtype=torch.float64)
    for w in range(len(ids)):
        total = 0.0
        for span, targets in _chunks(ids[w], chunk):
            # What has no name any more is gone before the next chunk has logits, which are as large.
            scores = remembered((w, span.start), partial(_log_probabilities, head, hidden[w : w + 1, span]))
            total += float(_losses(scores, targets).sum())
            del scores
        losses[w] = total / (ids.shape[1] - 1)
    return losses


def compare_tokens(
    heads: tuple[Head, Head],
    baseline: torch.Tensor,
    quantized: torch.Tensor,
    ids: torch.Tensor,
    chunk: int,
    remembered: Remembered = computed_now,
) -> TokenComparison:
    """Compares the next-token distributions that follow from two sets of final hidden states (windows, length, channels).

    Each has its own of the two `heads`, which differ where the residual stream was turned. Logits exist for `chunk` tokens
    at a time; `remembered` may know the baseline's log-probabilities of some chunks, (tokens, vocabulary), and keep others.
    """
    losses = torch.empty(len(ids), dtype=torch.float64)
    # In one piece from the start: what is kept of a chunk would lie in the gap that its logits leave, and the next ones need another.
    positions = len(ids) * (ids.shape[1] - 1)
    before, after, kl = (torch.empty(positions, dtype=torch.float64) for _ in range(3))
    agreed = torch.empty(positions, dtype=torch.bool)
    done = 0
    for w in range(len(ids)):
        total = 0.0
        for span, targets in _chunks(ids[w], chunk):
            first = remembered((w, span.start), partial(_log_probabilities, heads[0], baseline[w : w + 1, span]))
            second = _logits(heads[1], quantized[w : w + 1, span])
            start = done
            for r in _pieces(first):
                p, q = first[r], log_softmax(second[r], dim=-1)
                at = slice(done, done + len(p))
                before[at] = _losses(p, targets[r])
                after[at] = _losses(q, targets[r])
                agreed[at] = p.argmax(-1) == q.argmax(-1)
                kl[at] = _divergence(p, q)
                done = at.stop
            total += float(after[start:done].sum())
            del first, second, p, q  # as large as the logits of the chunk to come
        losses[w] = total / (ids.shape[1] - 1)
    return TokenComparison(losses, before, after, kl.clamp_min_(0), agreed)


def _logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the logits (tokens, vocabulary) of final hidden states (1, tokens, channels), float32.

    Nothing is rounded to codes after them, so that the fastest product will do.
    """
    with fast_linears():
        return head(hidden)[0].float()


def _log_probabilities(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities (tokens, vocabulary) that follow from final hidden states (1, tokens, channels), float32."""
    logits = _logits(head, hidden)
    for r in _pieces(logits):
        logits[r] = log_softmax(logits[r], dim=-1)
    return logits


def _pieces(logits: torch.Tensor) -> list[slice]:
    """Returns the tokens that are looked at together: on a CPU few, whose probabilities stay in its caches from pass to pass."""
    count = max(1, TOGETHER // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return [slice(i, i + count) for i in range(0, len(logits), count)]


def _losses(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the negative log-likelihoods of `targets` (tokens,) under (tokens, vocabulary), float64 (tokens,)."""
    return -log_probabilities.gather(1, targets.to(log_probabilities.device)[:, None])[:, 0].double()


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Returns KL(p || q) of each token, float64 (tokens,), out of log-probabilities (tokens, vocabulary); overwrites q."""
    difference = q.neg_().add_(p)
    return torch.einsum("tv,tv->t", p.exp(), difference).double()


def _chunks(ids: torch.Tensor, chunk: int) -> list[tuple[slice, torch.Tensor]]:
    last = len(ids) - 1
    return [(slice(i, min(i + chunk, last)), ids[i + 1 : min(i + chunk, last) + 1]) for i in range(0, last, chunk)]
