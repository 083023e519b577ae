"""Token losses of two models: what is held while logits pass by."""

import gc

import torch

from ptq.evaluation.token_comparison import compare_tokens


def test_nothing_is_kept_of_a_chunk_but_in_tensors_that_are_there_from_the_start():
    """A small tensor kept between two large ones that go leaves a gap too small for the next: a run on 32k tokens held 5 GiB."""
    hidden = torch.randn(2, 65, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(50, (2, 65), generator=torch.Generator().manual_seed(2))
    alive = []

    def head(x):
        # By type: `isinstance` asks proxies of what is gone, which raise.
        alive.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))
        return x @ weight.t()

    found = compare_tokens((head, head), hidden, hidden + 0.1, ids, chunk=8)
    # The baseline's logits and the quantized model's, chunk by chunk; the first chunk has no older names around.
    assert len(alive) == 2 * 2 * 8 and len(set(alive[2::2])) == 1 and len(set(alive[3::2])) == 1
    logs = [(x @ weight.t())[:, :-1].log_softmax(-1).flatten(0, 1) for x in (hidden, hidden + 0.1)]
    for got, log in ((found.baseline, logs[0]), (found.quantized, logs[1])):
        assert torch.allclose(got, -log.gather(1, ids[:, 1:].reshape(-1, 1))[:, 0].double(), atol=1e-5)
    assert torch.allclose(found.kl, (logs[0].exp() * (logs[0] - logs[1])).sum(-1).double(), atol=1e-5)
    assert torch.equal(found.same_top, logs[0].argmax(-1) == logs[1].argmax(-1))
    assert torch.allclose(found.losses, found.quantized.view(2, -1).mean(1))
