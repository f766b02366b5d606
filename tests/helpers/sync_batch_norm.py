"""SyncBatchNorm without a GPU: PyTorch's kernels for it, as plain formulas.

What calls them, when, and what the processes tell each other stays PyTorch's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FORWARD = nn.SyncBatchNorm.forward
NO_CHECK = mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle")


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let ``nn.SyncBatchNorm`` take tensors on the CPU, in this process and as long as it lasts."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    for kernel in (statistics, gather, normalize, backward_sums, backward):
        library.impl(KERNELS[kernel], kernel)
    with mock.patch.object(nn.SyncBatchNorm, "forward", forward), NO_CHECK:
        yield


def forward(layer, x):
    # The layer asks for a GPU, or for the backend of this name.
    with mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu"):
        return FORWARD(layer, x)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2))


def other_dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def statistics(x, eps):
    """Mean of each channel, and 1 / its standard deviation, of this process's batch."""
    var, mean = torch.var_mean(x, other_dims(x), correction=0)
    return mean, (var + eps).rsqrt()


def gather(x, means, inv_stds, running_mean, running_var, momentum, eps, counts):
    """The same of all batches together, from those of each process; updates what is running."""
    weights = (counts / counts.sum())[:, None]
    mean = (weights * means).sum(0)
    squares = inv_stds**-2 - eps + means**2
    var = (weights * squares).sum(0) - mean**2
    if running_mean is not None:
        unbiased = var * counts.sum() / (counts.sum() - 1)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(unbiased, momentum)
    return mean, (var + eps).rsqrt()


def normalize(x, weight, bias, mean, inv_std, eps):
    normalized = (x - per_channel(mean, x)) * per_channel(inv_std, x)
    if weight is None:
        return normalized
    return normalized * per_channel(weight, x) + per_channel(bias, x)


def backward_sums(dy, x, mean, inv_std, weight, input_grad, weight_grad, bias_grad):
    """Sums over this process's batch: of dy, of dy (x - mean); gradients of weight and bias."""
    sum_dy = dy.sum(other_dims(x))
    sum_dy_xmu = (dy * (x - per_channel(mean, x))).sum(other_dims(x))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * inv_std, sum_dy.clone()


def backward(dy, x, mean, inv_std, weight, sum_dy, sum_dy_xmu, counts):
    """Gradient of the input, from the sums over all processes."""
    size = counts.sum()
    along = (x - per_channel(mean, x)) * per_channel(inv_std**2 * sum_dy_xmu / size, x)
    scale = inv_std if weight is None else inv_std * weight
    return (dy - per_channel(sum_dy / size, x) - along) * per_channel(scale, x)


KERNELS = {
    statistics: "batch_norm_stats",
    gather: "batch_norm_gather_stats_with_counts",
    normalize: "batch_norm_elemt",
    backward_sums: "batch_norm_backward_reduce",
    backward: "batch_norm_backward_elemt",
}
