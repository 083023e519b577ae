"""What the trellis format loses on N(0, 1), and how long its codes take, by bits of a state and of a weight: docs/formats.md.

python -m experiments.trellis
"""

import time
from statistics import NormalDist

import torch

from quantize.codecs.trellis.codec import SIDE, STATE_BITS, permuted
from quantize.codecs.trellis.viterbi import Viterbi

TILES = 256
"""That are coded for each line, once before the clock runs."""


def main() -> None:
    """Prints mean squared error and processor seconds a million weights."""
    x = torch.randn(SIDE * SIDE, TILES, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean()) / x.std()
    print("| bits of a state | bits | mean squared error | bound | seconds a million weights |\n|---|---|---|---|---|")
    for state_bits, bits in ((8, 2), (10, 2), (12, 2), (14, 2), (STATE_BITS, 3), (STATE_BITS, 4)):
        states = 1 << state_bits
        quantiles = [NormalDist().inv_cdf((rank + 0.5) / states) for rank in range(states)]
        search = Viterbi(torch.tensor([quantiles[permuted(s, state_bits)] for s in range(states)]), bits)
        search.loops(x)
        start = time.process_time()
        error = (x - search.values[search.loops(x)]).square().mean()
        seconds = (time.process_time() - start) / x.numel() * 1e6
        print(f"| {state_bits} | {bits} | {error:.4f} | {0.25**bits:.4f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
