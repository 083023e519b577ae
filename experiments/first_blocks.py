"""A cheap look at a recipe: of a model with the first blocks only, on text that was not calibrated on, before and after.

    python -m experiments.first_blocks --blocks 3 --samples 24 scheme=w4a16_g64 method=gptq

Seconds where a row of experiments/smol_wt2.py takes minutes: for choosing among options, never a result of its own. Text of
the validation part far behind the calibration samples is looked at, none of the evaluation text.
"""

import argparse

import torch
from torch import nn

import ptq
from ptq.cli.catalog import locate
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.data.sampling import Draw
from ptq.errors import UserError
from ptq.files.store import store_of
from ptq.models.loading import load

LENGTH = 512
FAR = 150_000
"""Tokens of the calibration text after which what is looked at begins."""
LOOKED_AT = 4
"""Windows of `LENGTH` tokens that are looked at."""


@torch.no_grad()
def main() -> None:
    """Prints how far the next-token distributions of the first blocks, final norm and head have moved, in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3, help="how many are quantized")
    parser.add_argument("--samples", type=int, default=24, help=f"calibration samples of {LENGTH} tokens")
    parser.add_argument("overrides", nargs="*", help="of the recipe smollm2-135m_w8a8")
    asked = parser.parse_args()
    recipe = compose_jobs(locate("smollm2-135m_w8a8"), ["data=smol-wt2", *asked.overrides])[0].recipe
    loaded = load(recipe.model, recipe.execution, store_of(recipe))
    ids = Draw(recipe.data.calibration, None, LENGTH).tokens(loaded.tokenizer).ids
    far = ids.flatten()[FAR : FAR + LOOKED_AT * LENGTH].view(LOOKED_AT, LENGTH)
    body = loaded.model.model
    body.layers = nn.ModuleList(list(body.layers)[: asked.blocks])
    before = _log_probabilities(loaded.model, far)
    ptq.quantize(loaded.model, recipe.scheme, recipe.steps, ids[: asked.samples], recipe.calibration.batch_size)
    after = _log_probabilities(loaded.model, far)
    divergence = (before.exp() * (before - after)).sum(-1)
    print(f"KL(before || after) mean {divergence.mean():.5f}, median {divergence.median():.5f} nats a token")


def _log_probabilities(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Returns log-probabilities of the next token (windows, tokens, vocabulary): whatever basis the stream has, these are the same."""
    logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits.float().log_softmax(-1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
