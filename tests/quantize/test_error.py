"""KL divergence and its derivative, against torch's own."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from quantize.error import kl_divergence


@given(seed=st.integers(0, 999), size=st.floats(0.01, 30))
@settings(max_examples=40, deadline=None)
def test_the_divergence_and_its_derivative_are_autograds(seed, size):
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(2, 3, 17, generator=generator)).requires_grad_()
    target = size * torch.randn(2, 3, 17, generator=generator)
    found, by_logits = kl_divergence(logits.detach(), target)
    plain = functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found, plain.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_logits, torch.autograd.grad(plain.sum(), logits)[0], rtol=1e-4, atol=1e-5)


def test_equal_predictions_have_no_divergence_and_the_logits_are_left_as_they_are():
    logits = torch.randn(4, 9)
    kept = logits.clone()
    found, by_logits = kl_divergence(logits, logits + 3)
    assert float(found.abs().max()) < 1e-6 and float(by_logits.abs().max()) < 1e-6
    assert torch.equal(logits, kept)
    assert kl_divergence(logits.bfloat16(), logits.bfloat16())[1].dtype == torch.bfloat16
