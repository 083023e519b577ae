"""Perplexity by the protocol of METHODS.md section 8, and the paired comparison of two models on the same tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """Baseline against quantized model on the same windows.

    Perplexities are exp of the mean over windows of the mean loss per target; the interval belongs to the difference
    quantized - baseline; KL(baseline || quantized) in nats per token; top1_agreement is a share of tokens.
    """

    baseline_perplexity: float
    quantized_perplexity: float
    ratio: float
    difference: float
    difference_low: float
    difference_high: float
    confidence: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    windows: int
    tokens: int


def window_losses(head: Head, hidden: torch.Tensor, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Returns the mean next-token cross-entropy of every window, float64 (windows,).

    Args:
        head: final hidden states (1, tokens, channels) to logits (1, tokens, vocabulary).
        hidden: final hidden states (windows, length, channels).
        ids: token ids (windows, length).
        chunk: tokens whose logits exist at the same time.
    """
    losses = torch.empty(len(ids), dtype=torch.float64)
    for w in range(len(ids)):
        total = 0.0
        for span, targets in _chunks(ids[w], chunk):
            total += _loss(log_softmax(head(hidden[w : w + 1, span])[0].float(), dim=-1), targets)
        losses[w] = total / (ids.shape[1] - 1)
    return losses


@dataclass(frozen=True)
class TokenComparison:
    """Per-window losses of the quantized model, and per-token KL (tokens,) in nats and top-1 agreement."""

    losses: torch.Tensor
    kl: torch.Tensor
    agreement: float


def compare_tokens(
    heads: tuple[Head, Head], baseline: torch.Tensor, quantized: torch.Tensor, ids: torch.Tensor, chunk: int
) -> TokenComparison:
    """Compares the next-token distributions that follow from two sets of final hidden states (windows, length, channels).

    Each has its own of the two `heads`, which differ where the residual stream was turned. Logits exist for `chunk` tokens
    at a time.
    """
    losses = torch.empty(len(ids), dtype=torch.float64)
    divergences: list[torch.Tensor] = []
    agreed = 0
    for w in range(len(ids)):
        total = 0.0
        for span, targets in _chunks(ids[w], chunk):
            p = log_softmax(heads[0](baseline[w : w + 1, span])[0].float(), dim=-1)
            q = log_softmax(heads[1](quantized[w : w + 1, span])[0].float(), dim=-1)
            total += _loss(q, targets)
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            divergences.append(_divergence(p, q))
        losses[w] = total / (ids.shape[1] - 1)
    kl = torch.cat(divergences).clamp_min_(0)
    return TokenComparison(losses, kl, agreed / kl.numel())


def perplexity(losses: torch.Tensor) -> float:
    """Returns exp of the mean of per-window losses; inf where that overflows."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else math.inf


def bootstrap_interval(
    baseline: torch.Tensor, quantized: torch.Tensor, resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Returns the percentile-bootstrap interval of perplexity(quantized) - perplexity(baseline).

    Windows are drawn with replacement, the same ones for both models, so what windows share cancels.

    Args:
        baseline: per-window losses, float64 (windows,).
        quantized: the same windows' losses of the other model.
        resamples: number of bootstrap draws.
        confidence: coverage of the interval, 0 to 1.
        seed: seeds the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(baseline), (resamples, len(baseline)), generator=generator)
    difference = quantized[draws].mean(1).exp() - baseline[draws].mean(1).exp()
    tail = (1 - confidence) / 2
    low, high = torch.quantile(difference, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def compare(
    baseline: torch.Tensor, tokens: TokenComparison, length: int, resamples: int, confidence: float, seed: int
) -> Comparison:
    """Puts per-window losses of the baseline and a `TokenComparison` together into the figures of a result."""
    low, high = bootstrap_interval(baseline, tokens.losses, resamples, confidence, seed)
    before, after = perplexity(baseline), perplexity(tokens.losses)
    return Comparison(
        baseline_perplexity=before,
        quantized_perplexity=after,
        ratio=after / before,
        difference=after - before,
        difference_low=low,
        difference_high=high,
        confidence=confidence,
        kl_mean=float(tokens.kl.mean()),
        kl_p99=float(torch.quantile(tokens.kl[:: max(1, tokens.kl.numel() // 1_000_000)], 0.99)),
        top1_agreement=tokens.agreement,
        windows=len(baseline),
        tokens=len(baseline) * (length - 1),
    )


def _loss(log_probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    """Returns the summed negative log-likelihood of `targets` (tokens,) under (tokens, vocabulary), summed in float64."""
    return -float(log_probabilities.gather(1, targets.to(log_probabilities.device)[:, None]).double().sum())


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Returns KL(p || q) of each token, float64 (tokens,), out of log-probabilities (tokens, vocabulary); overwrites both.

    Chunks of logits are the largest tensors of an evaluation: no third one is made.
    """
    difference = q.neg_().add_(p)
    return torch.einsum("tv,tv->t", p.exp_(), difference).double()


def _chunks(ids: torch.Tensor, chunk: int) -> list[tuple[slice, torch.Tensor]]:
    last = len(ids) - 1
    return [(slice(i, min(i + chunk, last)), ids[i + 1 : min(i + chunk, last) + 1]) for i in range(0, last, chunk)]
