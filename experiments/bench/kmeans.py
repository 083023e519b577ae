"""Clustering the channels of the real OPT-1.3B: seconds, inertia, sizes, and the 4-bit error that cluster ranges save.

    PTQ_DATA=<folder> python -m experiments.bench.kmeans [--file opt-1.3b-act-absmax.safetensors] [--clusters 8 16 32]

PTQ_DATA is a folder with per-channel absolute maxima of every Linear's input (published with SmoothQuant). They are all
that is known of the activations, so features are (max, min) = (absmax, -absmax) of the inputs, and errors are of drawn
values: normal in each channel with standard deviation absmax / 4, cut at absmax. The grid is static, asymmetric, from the
maxima. Two figures, both means over the activations that read the residual stream (one for q, k, v, one for fc1, in each
block): |x - q|^2 / |x|^2 of the tensor, which outlier channels dominate, and the mean of that ratio over channels, 1 where
a channel is rounded to 0. Weights and standard deviations of the 576-row matrix are drawn too: it shows time only.
"""

import argparse
import sys
import time

import torch
from safetensors.torch import load_file

from group_methods.kmeans import ChannelRange, Clusters, cluster, features, max_min_features, max_std_features
from group_methods.reorder import cluster_sizes, expand, ranges_of
from ptq.data.protocols import data_folder
from quantize.grid.affine import fake_quantize, grid_from_range

BITS = 4
TOKENS = 256
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1")


def residual_readers(absmax: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns the absolute maxima (channels,) of each Linear that reads the residual stream, block by block."""
    blocks = 1 + max(int(name.split(".")[3]) for name in absmax if ".layers." in name)
    return [absmax[f"model.decoder.layers.{i}.{reader}"] for i in range(blocks) for reader in READERS]


def errors(absmax: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[float, float]:
    """Returns the relative error of the tensor and the mean over channels, with one static range for each label."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, len(absmax), generator=generator) * absmax / 4
    x = torch.maximum(torch.minimum(x, absmax), -absmax)
    low, high = (expand(labels, end) for end in ranges_of(labels, -absmax, absmax))
    noise = (fake_quantize(x, grid_from_range(low, high, BITS, False)) - x).double().square().sum(0)
    signal = x.double().square().sum(0)
    used = signal > 0
    return float(noise.sum() / signal.sum()), float((noise[used] / signal[used]).mean())


def mean_errors(activations: list[torch.Tensor], labels: list[torch.Tensor]) -> tuple[float, float]:
    """Returns both figures of `errors`, each a mean over the activations."""
    both = [errors(a, own, seed) for seed, (a, own) in enumerate(zip(activations, labels, strict=True))]
    return sum(a for a, _ in both) / len(both), sum(b for _, b in both) / len(both)


def inertia(matrix: torch.Tensor, found: Clusters) -> float:
    """Returns the share of the features' variance that clusters leave: 1 with one cluster, 0 with one a channel."""
    left = (matrix.T - found.centroids[found.labels]).square().sum()
    return float(left / (matrix.T - matrix.mean(1)).square().sum())


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="opt-1.3b-act-absmax.safetensors", help="in the folder PTQ_DATA")
    parser.add_argument("--clusters", type=int, nargs="+", default=[8, 16, 32], help="numbers of clusters to try")
    options = parser.parse_args()
    path = data_folder() / options.file
    if not path.is_file():
        sys.exit(f"error: PTQ_DATA: {path} is not there: name the folder with the profile")
    readers = residual_readers({name: t.float() for name, t in load_file(path).items()})
    # q, k and v read one tensor: its error is counted once.
    activations = [a for i, a in enumerate(readers) if i % len(READERS) in (0, 3)]
    channels = len(readers[0])
    print(f"{path.name}: {len(readers)} Linears read {channels} residual channels; {BITS} bits, {TOKENS} drawn tokens")
    timed(readers, options.clusters)

    extent = torch.stack(readers).amax(0)
    tensor = mean_errors(activations, [torch.zeros(channels, dtype=torch.int64)] * len(activations))
    print(f"\n{'ranges':44} {'tensor':>8} {'saved':>6} {'channels':>9} {'saved':>6}")
    report("one a tensor", tensor, tensor)
    for k in options.clusters:
        blocks = torch.arange(channels) * k // channels
        report(f"{k} equal runs of channels, unsorted", mean_errors(activations, [blocks] * len(activations)), tensor)
        for standardise in (False, True):
            rows = [row for a in readers for row in (a, -a)]
            matrix = features(rows, standardise)
            start = time.perf_counter()
            found = cluster(matrix, k, extent=extent)
            seconds = time.perf_counter() - start
            how = "standardised" if standardise else "raw"
            name = f"{len(found.centroids)} clusters for the network, {how}"
            report(name, mean_errors(activations, [found.labels] * len(activations)), tensor)
            sizes = " ".join(map(str, cluster_sizes(found.labels).tolist()))
            print(f"    {seconds:.2f} s, inertia {inertia(matrix, found):.4f}, sizes by range: {sizes}")
        start = time.perf_counter()
        own = [cluster(max_min_features(-a, a, standardise=False), k).labels for a in activations]
        seconds = time.perf_counter() - start
        report(f"{k} clusters for each activation (RPTQ)", mean_errors(activations, own), tensor)
        print(f"    {seconds:.2f} s for {len(own)} activations")
    report("one a channel", mean_errors(activations, [torch.arange(channels)] * len(activations)), tensor)


def timed(readers: list[torch.Tensor], clusters: list[int]) -> None:
    """Prints the seconds of max-std k-means at its true size, on drawn weights and standard deviations."""
    generator = torch.Generator().manual_seed(0)
    inputs = [ChannelRange(-a, a, a / 4) for a in readers]
    weights = []
    for a in readers:
        spread = (torch.randn(len(a), generator=generator) * 0.3 - 4).exp()
        weights.append(ChannelRange(-4 * spread, 4 * spread, spread))
    for standardise in (False, True):
        matrix = max_std_features(inputs, weights, standardise)
        for k in clusters:
            start = time.perf_counter()
            cluster(matrix, k)
            seconds = time.perf_counter() - start
            print(
                f"{matrix.shape[0]} rows x {matrix.shape[1]} channels, standardise {standardise}, {k}: {seconds:.2f} s"
            )


def report(name: str, figures: tuple[float, float], tensor: tuple[float, float]) -> None:
    """Prints one row of the table: both errors, and the share of the per-tensor error that is saved."""
    cells = "".join(f" {e:9.4f} {1 - e / base:6.1%}" for e, base in zip(figures, tensor, strict=True))
    print(f"{name:43}{cells}", flush=True)


if __name__ == "__main__":
    main()
