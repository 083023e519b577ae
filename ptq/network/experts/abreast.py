"""Stages of a block's experts that do not see one another: what one pass of the samples can show together."""

from collections.abc import Sequence

from ptq.network.network import Block, weight_of

Stage = tuple[str, ...]
"""Full names of the Linears that read one tensor."""
LEAST_BYTES = 256 << 20
"""Bytes of moments that the stages of one pass may sum whatever the block's size: more passes where that is exceeded."""


def most_bytes(parameters: int) -> int:
    """Returns the bytes of moments that the stages of one pass may sum: half of the float32 bytes of a block with so many parameters.

    With the block itself and the next one, which waits in 16 bits, that is two blocks.
    """
    return max(LEAST_BYTES, 2 * parameters)


def abreast(block: Block, stages: Sequence[Stage], sums: int) -> list[list[Stage]]:
    """Returns the stages in the order of their calls, those together that need nothing of one another.

    The experts of a mixture all read what the router hands them: their first stages go together, then their second ones. Every
    other stage is by itself.

    Args:
        block: of the stages.
        stages: in the order of their calls.
        sums: of the same moments, float32 (in, in), that are held at a time (`ptq.ranks.sample_sum.sums_held`).
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
                found += _in_bounds(block, together, sums)
    return found


def _in_bounds(block: Block, stages: Sequence[Stage], sums: int) -> list[list[Stage]]:
    """Returns the stages in as many lists as it takes for each to stay within `most_bytes`."""
    most = most_bytes(sum(weight_of(linear).numel() for linear in block.linears.values()))
    found: list[list[Stage]] = []
    held = 0
    for stage in stages:
        size = 4 * sums * weight_of(block.linears[stage[0]]).shape[1] ** 2
        if not found or held + size > most:
            found.append([])
            held = 0
        found[-1].append(stage)
        held += size
    return found
