"""Stages of a block's experts that do not see one another: what one pass of the samples can show together."""

from collections.abc import Sequence

from ptq.network.network import Block, weight_of

Stage = tuple[str, ...]
"""Full names of the Linears that read one tensor."""
MOST_BYTES = 512 << 20
"""Bytes of moments that the stages of one pass may sum, two float32 (in, in) each: more passes where that is exceeded."""


def abreast(block: Block, stages: Sequence[Stage]) -> list[list[Stage]]:
    """Returns the stages in the order of their calls, those together that need nothing of one another.

    The experts of a mixture all read what the router hands them: their first stages go together, then their second ones. Every
    other stage is by itself.

    Args:
        block: of the stages.
        stages: in the order of their calls.
    """
    mixture = {name: expert.rpartition(".")[0] for expert, names in block.experts.items() for name in names}
    expert = {name: expert for expert, names in block.experts.items() for name in names}
    depth: dict[str, int] = {}
    of_mixture: dict[str, dict[int, list[Stage]]] = {}
    for stage in stages:
        if stage[0] in expert:
            at = depth[expert[stage[0]]] = depth.get(expert[stage[0]], -1) + 1
            of_mixture.setdefault(mixture[stage[0]], {}).setdefault(at, []).append(stage)
    found: list[list[Stage]] = []
    for stage in stages:
        if stage[0] not in expert:
            found.append([stage])
        else:
            # All of a mixture where its first stage is called: nothing but the router comes before its experts.
            for together in of_mixture.pop(mixture[stage[0]], {}).values():
                found += _in_bounds(block, together)
    return found


def _in_bounds(block: Block, stages: Sequence[Stage]) -> list[list[Stage]]:
    """Returns the stages in as many lists as it takes for each to stay within `MOST_BYTES`."""
    found: list[list[Stage]] = []
    held = 0
    for stage in stages:
        size = 8 * weight_of(block.linears[stage[0]]).shape[1] ** 2
        if not found or held + size > MOST_BYTES:
            found.append([])
            held = 0
        found[-1].append(stage)
        held += size
    return found
