"""Moving channels so that those of one cluster are contiguous (RPTQ, Yuan et al. 2023), and ranges of clusters.

A simulation needs none of the moves: `expand` gives every channel its cluster's range wherever it stands, and the numbers
are the same. Kernels want clusters contiguous; then producer rows and reader columns move alike, and nothing else changes.

Rotary embeddings are the exception. They turn channels i and i + head_dim / 2 of a query or key (half-split layout) by an
angle that is the pair's own, so rows of the query and key projections cannot be moved as other rows are: after a move of
W_q and W_k a pair would turn with another pair's frequency, and attention scores change, even when pairs move together.
Two ways are right:

- Move after the rotation (`gather_heads`). Any order inside a head will do, pairs need not stay together: a score is a sum
  over channels, and query and key have the same order.
- Move W_q and W_k rows by an order that keeps pairs, halves apart (`paired_order`), *and* give the heads cosine and sine
  tables in the same order (`permute_rotary`). Tables are then a head's own, no longer one for all.

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


def paired_order(labels: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Returns int64 (heads * head_dim,): an order of query or key channels that keeps rotary pairs (half-split layout).

    Channels i and i + head_dim / 2 of a head move to j and j + head_dim / 2. A cluster is therefore two runs in a head, one
    in each half: a pair cannot be put side by side or swapped without another rotation. Rows of W_q and W_k that have this
    order need tables of `permute_rotary`.

    Raises:
        ValueError: for an odd `head_dim`, channels that are no whole heads, or labels of a pair that differ.
    """
    _sizes(labels)
    if head_dim < 2 or head_dim % 2 or len(labels) % head_dim:
        raise ValueError(f"head_dim: {head_dim} is odd or does not divide {len(labels)} channels")
    halves = labels.view(-1, 2, head_dim // 2)
    if not torch.equal(halves[:, 0], halves[:, 1]):
        raise ValueError("labels: channels i and i + head_dim / 2 differ: cluster with paired=True")
    inside = halves[:, 0].argsort(dim=-1, stable=True)
    start = torch.arange(0, len(labels), head_dim, device=labels.device)[:, None]
    return torch.cat([start + inside, start + inside + head_dim // 2], dim=1).reshape(-1)


def permute_rotary(table: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Returns a cosine or sine table (..., tokens, head_dim) for each head: (..., heads, tokens, head_dim).

    For queries and keys whose projection rows have the order `order` (heads * head_dim,) of `paired_order`: their rotation
    with these tables is the old rotation, reordered.

    Raises:
        ValueError: for an order that leaves a head or parts a pair.
    """
    inside = _inside_heads(order, table.shape[-1])
    half = table.shape[-1] // 2
    if not torch.equal(inside[:, :half] + half, inside[:, half:]):
        raise ValueError(
            "order: parts channels i and i + head_dim / 2: use paired_order, or gather_heads after the rotation"
        )
    return table[..., inside.to(table.device)].transpose(-3, -2)


def gather_heads(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Returns queries or keys x (..., heads, tokens, head_dim), taken after the rotation, in the order `order`.

    With the same order inside a query head and its key head, attention scores are what they were.

    Raises:
        ValueError: for an order (heads * head_dim,) of another number of heads, or one that leaves a head.
    """
    heads, _, head_dim = x.shape[-3:]
    if len(order) != heads * head_dim:
        raise ValueError(f"order: {len(order)} channels, expected {heads} heads of {head_dim}")
    return x.gather(-1, _inside_heads(order, head_dim)[:, None].expand(x.shape).to(x.device))


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


def _inside_heads(order: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Returns `order` (heads * head_dim,) as places inside heads (heads, head_dim); ValueError when it leaves one."""
    if len(order) % head_dim:
        raise ValueError(f"order: {len(order)} channels are no whole heads of {head_dim}")
    inside = order.view(-1, head_dim) - torch.arange(0, len(order), head_dim, device=order.device)[:, None]
    if not torch.equal(inside.sort(dim=1).values, torch.arange(head_dim, device=order.device).expand_as(inside)):
        raise ValueError("order: moves channels out of their head: use labels of cluster_heads")
    return inside
