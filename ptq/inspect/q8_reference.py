"""A forward pass over a llama2.c or KuiperLLama file with the arithmetic of its runtime, in torch: for checking exports."""

import torch
from torch.nn import functional

from ptq.inspect.q8_readers import Q8File


class Reference:
    """Computes logits as the runtime of the file does.

    Args:
        file: the model; its tensors are dequantized once and stay in memory.
        rope_base: the base that the runtime hard-codes.
        eps: of the RMS norms.
        interleaved: rotary pairs are neighbours (2i, 2i + 1), or else (i, i + head_dim / 2).
        int8_inputs: inputs of every matrix are rounded to int8 in groups (llama2.c), or stay in fp32 (KuiperLLama).
    """

    def __init__(self, file: Q8File, rope_base: float, eps: float, interleaved: bool, int8_inputs: bool):
        self.header = file.header
        self.weights = {name: file.read(name) for name in file.places}
        self.rope_base, self.eps, self.interleaved, self.int8_inputs = rope_base, eps, interleaved, int8_inputs

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns logits (tokens, vocabulary) for `ids` (tokens,)."""
        h, w = self.header, self.weights
        x = w["tok_embeddings"][ids]
        cosine, sine = self._angles(len(ids))
        for layer in range(h.layers):
            y = self._norm(x, f"layers.{layer}.attention_norm")
            heads = [
                self._matrix(y, f"layers.{layer}.{name}").view(len(ids), -1, h.dim // h.heads)
                for name in ("wq", "wk", "wv")
            ]
            q, k = (self._rotate(part, cosine, sine).transpose(0, 1) for part in heads[:2])
            v = heads[2].transpose(0, 1)
            repeat = h.heads // h.kv_heads
            k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self._matrix(y.transpose(0, 1).reshape(len(ids), h.dim), f"layers.{layer}.wo")
            y = self._norm(x, f"layers.{layer}.ffn_norm")
            gate = functional.silu(self._matrix(y, f"layers.{layer}.w1"))
            x = x + self._matrix(gate * self._matrix(y, f"layers.{layer}.w3"), f"layers.{layer}.w2")
        return self._matrix(self._norm(x, "final_norm"), "tok_embeddings" if h.shared else "output")

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.weights[name] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def _matrix(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.int8_inputs:
            groups = x.unflatten(-1, (-1, self.header.group_size))
            scale = groups.abs().amax(-1, keepdim=True) / 127
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            quotient = groups / scale
            # C's round(): halves go away from zero.
            x = (torch.sign(quotient) * torch.floor(quotient.abs() + 0.5) * scale).reshape(x.shape)
        return functional.linear(x, self.weights[name])

    def _angles(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.header.dim // self.header.heads
        frequency = self.rope_base ** (-torch.arange(0, size, 2).float() / size)
        angle = torch.arange(tokens).float()[:, None] * frequency
        return angle.cos()[:, None], angle.sin()[:, None]

    def _rotate(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """Returns `x` (tokens, heads, head_dim) rotated pair by pair."""
        first, second = (x[..., 0::2], x[..., 1::2]) if self.interleaved else x.chunk(2, -1)
        a, b = first * cosine - second * sine, first * sine + second * cosine
        return torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)
