"""Which channels belong together: k-means over per-channel figures (METHODS.md section 4: max-std k-means, RPTQ)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

KINDS = ("max", "min", "std")
SOURCES = ("input", "weight")


@dataclass(frozen=True)
class ChannelRange:
    """A tensor's min, max and standard deviation in each channel, floating point (channels,)."""

    min: torch.Tensor
    max: torch.Tensor
    std: torch.Tensor


@dataclass(frozen=True)
class Clusters:
    """A partition of channels.

    Attributes:
        centroids: float64 (k, features), the mean of the members' features; no cluster is empty.
        labels: int64 (channels,), the cluster of each channel: every number from 0 to k - 1 occurs.
    """

    centroids: torch.Tensor
    labels: torch.Tensor


def features(rows: Sequence[torch.Tensor], standardise: bool) -> torch.Tensor:
    """Returns the feature matrix, float64 (features, channels), one row for each of `rows` (channels,).

    With `standardise` every row gets mean 0 and (population) standard deviation 1 over the channels, so that each counts
    alike; a row that is constant up to rounding becomes 0 and does not count. Without it rows keep their units: those with
    the greatest ranges (activation outliers) decide.

    Raises:
        ValueError: for no rows, rows of unlike lengths, or NaN or inf in one.
    """
    return _matrix({f"rows[{i}]": row for i, row in enumerate(rows)}, standardise)


def max_std_features(
    inputs: Sequence[ChannelRange],
    weights: Sequence[ChannelRange],
    standardise: bool,
    kinds: Sequence[str] = KINDS,
    sources: Sequence[str] = SOURCES,
) -> torch.Tensor:
    """Returns the features of max-std k-means: (Linears * sources * kinds, channels), float64.

    Linears vary slowest and `kinds` fastest: input max, min, std, then weight max, min, std of the first Linear. OPT-1.3B
    has 24 blocks * 4 Linears * 6 = 576 rows of 2048 channels. q, k and v read one tensor: its rows occur three times, and
    so count three times.

    Args:
        inputs: for each Linear that reads the residual stream, the figures of its input.
        weights: for each of them, the figures of its weight's columns (over output rows).
        standardise: see `features`.
        kinds: which of ``max``, ``min``, ``std`` take part.
        sources: which of ``input``, ``weight`` take part.

    Raises:
        ValueError: for unlike numbers of inputs and weights, an unknown or repeated kind or source, or what `features` refuses.
    """
    _check_names("kinds", kinds, KINDS)
    _check_names("sources", sources, SOURCES)
    if len(inputs) != len(weights):
        raise ValueError(f"weights: {len(weights)} Linears, but inputs has {len(inputs)}: give both for each Linear")
    ranges = {"input": inputs, "weight": weights}
    rows: dict[str, torch.Tensor] = {}
    for i in range(len(inputs)):
        for source in sources:
            rows |= {f"{source}s[{i}].{kind}": getattr(ranges[source][i], kind) for kind in kinds}
    return _matrix(rows, standardise)


def max_min_features(minimum: torch.Tensor, maximum: torch.Tensor, standardise: bool) -> torch.Tensor:
    """Returns RPTQ's features of one activation (Yuan et al. 2023): its max and min (channels,) as (2, channels), float64.

    RPTQ itself does not standardise. Raises ValueError as `features` does.
    """
    return _matrix({"maximum": maximum, "minimum": minimum}, standardise)


def share_heads(features: torch.Tensor, head_dim: int, repeat: int) -> torch.Tensor:
    """Returns features (rows, heads * head_dim) of query heads as features of the key/value heads that they read.

    `repeat` consecutive query heads read one head (grouped-query attention); their rows are stacked, which gives
    (repeat * rows, heads / repeat * head_dim). Clustering the result gives one label vector for each key/value head; to
    cluster queries and keys together, stack the key's own rows below.

    Raises:
        ValueError: when the channels are not whole groups of `repeat` heads.
    """
    rows, channels = features.shape
    if head_dim < 1 or repeat < 1 or channels % (head_dim * repeat):
        raise ValueError(f"repeat: {channels} channels are no whole groups of {repeat} heads of {head_dim} channels")
    grouped = features.view(rows, -1, repeat, head_dim)
    return grouped.permute(2, 0, 1, 3).reshape(repeat * rows, channels // repeat)


def cluster(
    features: torch.Tensor, clusters: int, seed: int = 0, restarts: int = 10, extent: torch.Tensor | None = None
) -> Clusters:
    """Returns the partition of the columns of `features` (features, channels) that scikit-learn's KMeans finds.

    Lloyd's algorithm in float64 on the CPU with k-means++ starts, the best of `restarts`; one thread, because the order in
    which threads add changes the last bits. The results lie on the device of `features`.

    Clusters are numbered by ascending mean `extent` of their channels, so that neighbours have like ranges; without
    `extent` by ascending Euclidean norm of their centroid, which orders them by range only where features are not
    standardised. Ties go to the cluster with the first channel.

    There are fewer clusters than asked for where channels with equal features leave fewer distinct ones: each distinct one
    is then a cluster. Features equal up to rounding do the same, with scikit-learn's ConvergenceWarning.

    Args:
        features: floating point (features, channels).
        clusters: greatest number of clusters, 1 or more.
        seed: of the starts.
        restarts: how many times to start.
        extent: floating point (channels,), for instance the channels' absolute maxima; numbers clusters, forms none.

    Raises:
        ValueError: for NaN or inf, no channels, clusters or restarts below 1, or an extent of another shape.
    """
    points, sizes = _checked(features, clusters, restarts, extent)
    with threadpool_limits(limits=1):
        centroids, labels = _fit(points, sizes, clusters, seed, restarts)
    return _on_device(features, [centroids], [labels])


def cluster_heads(
    features: torch.Tensor,
    head_dim: int,
    clusters: int,
    seed: int = 0,
    restarts: int = 10,
    extent: torch.Tensor | None = None,
) -> Clusters:
    """Returns partitions of the channels inside each head, numbered on from head to head.

    Cluster c of head h has the number ``h * clusters + c`` when every head has `clusters` clusters; a head with fewer (see
    `cluster`) leaves no gap. Inside a head clusters are numbered as `cluster` does.

    Args:
        features: floating point (features, heads * head_dim).
        head_dim: channels of a head.
        clusters: greatest number of clusters in a head.
        seed: of each head's starts.
        restarts: how many times to start in each head.
        extent: see `cluster`.

    Raises:
        ValueError: for channels that are no whole heads, or what `cluster` refuses.
    """
    points, sizes = _checked(features, clusters, restarts, extent)
    if head_dim < 1 or len(points) % head_dim:
        raise ValueError(f"head_dim: {head_dim} does not divide {len(points)} channels")
    centroids, labels, count = [], [], 0
    with threadpool_limits(limits=1):
        for start in range(0, len(points), head_dim):
            head = points[start : start + head_dim]
            order = None if sizes is None else sizes[start : start + head_dim]
            centres, own = _fit(head, order, clusters, seed, restarts)
            centroids.append(centres)
            labels.append(own + count)
            count += len(centres)
    return _on_device(features, centroids, labels)


def _matrix(rows: dict[str, torch.Tensor], standardise: bool) -> torch.Tensor:
    """Stacks named rows (channels,) into float64 (rows, channels); ValueError with the name of the first that is wrong."""
    if not rows:
        raise ValueError("rows: there are none: give one or more")
    shape = next(iter(rows.values())).shape
    for name, row in rows.items():
        if row.ndim != 1 or row.shape != shape:
            raise ValueError(f"{name}: shape {tuple(row.shape)}, expected one dimension of length {shape[-1:].numel()}")
    table = torch.stack([row.double() for row in rows.values()])
    finite = torch.isfinite(table).all(1).tolist()
    if not all(finite):
        raise ValueError(f"{list(rows)[finite.index(False)]}: holds NaN or inf: take the statistics again")
    return _standardised(table) if standardise else table


def _standardised(table: torch.Tensor) -> torch.Tensor:
    """Returns (rows, channels) with mean 0 and standard deviation 1 in each row, 0 in a row that is constant."""
    centred = table - table.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    # The mean of equal values is off by rounding: what is left of a constant row is noise, not a feature.
    noise = table.abs().amax(1, keepdim=True) * table.shape[1] * torch.finfo(table.dtype).eps
    constant = spread <= noise
    return torch.where(constant, 0.0, centred / torch.where(constant, 1.0, spread))


def _check_names(field: str, names: Sequence[str], choices: tuple[str, ...]) -> None:
    if not names or len(set(names)) != len(names) or not set(names) <= set(choices):
        raise ValueError(f"{field}: {tuple(names)} is not valid: expected some of {', '.join(choices)}, each once")


def _checked(
    features: torch.Tensor, clusters: int, restarts: int, extent: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns points (channels, features) and extents (channels,) as float64 arrays; ValueError for what cannot be clustered."""
    for name, number in (("clusters", clusters), ("restarts", restarts)):
        if number < 1:
            raise ValueError(f"{name}: {number} is too small: use 1 or more")
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"features: shape {tuple(features.shape)}, expected (features, channels), neither of them 0")
    if not torch.isfinite(features).all():
        row = int((~torch.isfinite(features)).any(1).nonzero()[0])
        raise ValueError(f"features: row {row} holds NaN or inf: take the statistics again")
    points = np.ascontiguousarray(features.detach().double().cpu().numpy().T)
    if extent is None:
        return points, None
    if extent.shape != features.shape[1:]:
        raise ValueError(f"extent: shape {tuple(extent.shape)}, expected ({features.shape[1]},)")
    if not torch.isfinite(extent).all():
        raise ValueError("extent: holds NaN or inf: take the statistics again")
    return points, extent.detach().double().cpu().numpy()


def _fit(
    points: np.ndarray, extent: np.ndarray | None, clusters: int, seed: int, restarts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns centroids (k, features) and labels (channels,) of `points` (channels, features), numbered."""
    centroids, labels = np.unique(points, axis=0, return_inverse=True)
    labels = labels.reshape(-1)
    if len(centroids) > clusters:
        model = KMeans(n_clusters=clusters, n_init=restarts, random_state=seed).fit(points)
        # Its last assignment may empty a cluster: numbers go to those with members.
        used, labels = np.unique(model.labels_, return_inverse=True)
        centroids = model.cluster_centers_[used]
    first = np.unique(labels, return_index=True)[1]
    if extent is None:
        key = np.linalg.norm(centroids, axis=1)
    else:
        key = np.bincount(labels, weights=extent) / np.bincount(labels)
    order = np.lexsort((first, key))
    return centroids[order], np.argsort(order)[labels]


def _on_device(features: torch.Tensor, centroids: list[np.ndarray], labels: list[np.ndarray]) -> Clusters:
    centres = torch.from_numpy(np.concatenate(centroids)).to(features.device)
    return Clusters(centres, torch.from_numpy(np.concatenate(labels)).to(features.device, torch.int64))
