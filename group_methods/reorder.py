"""Moving channels so that those of one cluster are contiguous (RPTQ, Yuan et al. 2023), and ranges of clusters.

A simulation needs none of the moves: `expand` gives every channel its cluster's range wherever it stands, and the numbers
are the same. Kernels want clusters contiguous; then producer rows and reader columns move alike, and nothing else changes.

Rotary embeddings are the exception. They turn channels i and i + head_dim / 2 of a query or key (half-split layout) by an
angle that is the pair's own, so rows of the query and key projections cannot be moved as other rows are: after a move of
W_q and W_k a pair would turn with another pair's frequency, and attention scores change, even when pairs move together.
Clusters of queries and keys are therefore made of what the rotation gives, and a kernel would move channels there: any order
inside a head will do, pairs need not stay together, since a score is a sum over channels, and query and key have the same order.

With grouped-query attention the query heads that read one key head have its order (`repeat_heads`).
"""

import torch


def order_of(labels: torch.Tensor) -> torch.Tensor:
    """Returns int64 (channels,): the channels sorted by label, those of one cluster in their old order.

    ``x[order]`` has cluster 0 first, then 1, and so on. Labels that `cluster_heads` numbered give an order in which
    channels stay inside their head.

    Raises:
        ValueError: for labels that are not one dimension of whole numbers 0 .. k - 1 that all occur.
    """
    _sizes(labels)
    return labels.argsort(stable=True)


def inverse(order: torch.Tensor) -> torch.Tensor:
    """Returns the order that undoes `order` (channels,): ``x[order][inverse(order)]`` is x.

    Raises:
        ValueError: when `order` is no permutation of 0 .. channels - 1.
    """
    _check_order(order, len(order))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device, dtype=order.dtype)
    return back


def cluster_sizes(labels: torch.Tensor) -> torch.Tensor:
    """Returns int64 (k,): how many channels each cluster has. Raises ValueError as `order_of` does."""
    return _sizes(labels)


def permute_rows(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Returns a producer's weight (out, in), bias (out,) or norm parameter (channels,) with outputs in the new order.

    Raises:
        ValueError: when `order` is no permutation of the first dimension.
    """
    _check_order(order, tensor.shape[0])
    return tensor.index_select(0, order.to(tensor.device))


def permute_columns(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Returns a reader's weight (out, in) with its input channels in the new order: it reads what `permute_rows` writes.

    Raises:
        ValueError: when `order` is no permutation of the last dimension.
    """
    _check_order(order, weight.shape[-1])
    return weight.index_select(-1, order.to(weight.device))


def repeat_heads(labels: torch.Tensor, head_dim: int, repeat: int) -> torch.Tensor:
    """Returns labels (repeat * channels,) of query heads out of labels (channels,) of the key/value heads that they read.

    Query heads ``h * repeat`` to ``h * repeat + repeat - 1`` read head h. Each has the same clusters as its head, under
    numbers of its own, so that `order_of` moves channels inside heads only, and in all of them as in head h.

    Raises:
        ValueError: for channels that are no whole heads, or labels that `order_of` refuses.
    """
    count = len(_sizes(labels))
    if head_dim < 1 or repeat < 1 or len(labels) % head_dim:
        raise ValueError(f"head_dim: {len(labels)} labels are no whole heads of {head_dim} channels")
    heads = labels.view(-1, 1, head_dim).expand(-1, repeat, -1).reshape(-1, head_dim)
    number = torch.arange(len(heads), device=labels.device)[:, None]
    return torch.unique(number * count + heads, return_inverse=True)[1].reshape(-1)


def ranges_of(labels: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each cluster's least minimum and greatest maximum, (k,) each, of channels' `minimum` and `maximum` (channels,).

    Raises:
        ValueError: for ranges of another shape than the labels, NaN or inf in them, or labels that `order_of` refuses.
    """
    ends = []
    for name, values, reduce in (("minimum", minimum, "amin"), ("maximum", maximum, "amax")):
        if values.shape != labels.shape:
            raise ValueError(f"{name}: shape {tuple(values.shape)}, expected that of the labels {tuple(labels.shape)}")
        if not torch.isfinite(values).all():
            raise ValueError(f"{name}: holds NaN or inf: take the statistics again")
        start = values.new_zeros(len(_sizes(labels)))
        ends.append(start.scatter_reduce(0, labels.to(values.device, torch.int64), values, reduce, include_self=False))
    return ends[0], ends[1]


def expand(labels: torch.Tensor, per_cluster: torch.Tensor) -> torch.Tensor:
    """Returns (..., channels): for each channel the value of its cluster in `per_cluster` (..., k).

    Raises:
        ValueError: when there are more clusters in the labels than values, or fewer.
    """
    count = len(_sizes(labels))
    if per_cluster.shape[-1] != count:
        raise ValueError(f"per_cluster: {per_cluster.shape[-1]} values for {count} clusters")
    return per_cluster.index_select(-1, labels.to(per_cluster.device, torch.int64))


def _sizes(labels: torch.Tensor) -> torch.Tensor:
    """Returns the sizes of clusters (k,); ValueError for what are no labels."""
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels: {labels.dtype} {tuple(labels.shape)}, expected whole numbers (channels,)")
    if int(labels.min()) < 0 or int(labels.max()) >= len(labels):
        raise ValueError(f"labels: {int(labels.min())} .. {int(labels.max())}, expected 0 .. {len(labels) - 1} at most")
    sizes = torch.bincount(labels)
    if not sizes.all():
        raise ValueError(f"labels: no channel has label {int((sizes == 0).nonzero()[0])}: number clusters without gaps")
    return sizes


def _check_order(order: torch.Tensor, length: int) -> None:
    numbers = torch.arange(length, device=order.device)
    if order.shape != (length,) or not torch.equal(order.sort().values, numbers.to(order.dtype)):
        raise ValueError(f"order: {order.dtype} {tuple(order.shape)} is no permutation of 0 .. {length - 1}")
