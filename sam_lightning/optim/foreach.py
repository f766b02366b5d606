"""Norms, products and steps over lists of tensors, as if each list were one vector."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What torch's fused kernels move correctly. In torch 2.6 the CPU's skip half precision. CUDA's read
# the step size as a float32, which would round it for float64 weights.
FUSED = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
PLAIN: dict[str, Any] = {
    **{"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0},
    **{"nesterov": False, "is_first_step": False},
}


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, 0-dim, on the first one's device; no host sync."""
    return norm_of_norms(norms_of(tensors))


def norm_of_norms(norms: list[Tensor]) -> Tensor:
    """The 2-norm of the whole from norms of its parts, each 0-dim; reduced over shards' devices."""
    if any_sharded(norms):
        sharded = torch.stack([n for n in norms if any_sharded([n])])
        rest = [n for n in norms if not any_sharded([n])]
        norms = [_whole(torch.linalg.vector_norm(sharded)), *rest]
    if len({n.device for n in norms}) > 1:
        norms = [n.to(norms[0].device) for n in norms]
    return torch.linalg.vector_norm(torch.stack(norms))


def norms_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, 0-dim, grouped by dtype and accumulated in float32 at least."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for t in tensors:
        by_dtype[t.dtype].append(t)
    norms: list[Tensor] = []
    for dtype, same in by_dtype.items():
        wide = torch.promote_types(dtype, torch.float32)
        if any_sharded(same):  # their norm takes no other dtype, and no foreach
            norms += [torch.linalg.vector_norm(t.to(wide)) for t in same]
        else:
            norms += torch._foreach_norm(same, 2, dtype=wide)
    return norms


def inner_product(ones: Iterable[Tensor], others: Iterable[Tensor]) -> Tensor:
    """The sum of all products of two lists of tensors of the same shapes, 0-dim, float32 at least.

    The sum goes tensor by tensor, since all products would take as much memory as the weights.
    """
    total: Tensor | None = None
    for a, b in zip(ones, others, strict=True):
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        dtype = torch.promote_types(a.dtype, torch.float32)
        product = _whole(torch.sum(a.to(dtype) * b))
        total = product if total is None else total + product.to(total.device)
    assert total is not None
    return total


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one is a DTensor, FSDP2's type of parameters and gradients."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return _sharded_type() in set(map(type, tensors))


def _sharded_type() -> Any:
    # Importing it takes half a second. Whoever has such a tensor has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if any_sharded([t]) else t  # type: ignore[attr-defined]


def local_parts(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """This rank's shards, in the same memory; other tensors as they are."""
    if not any_sharded(tensors):
        return tensors
    return [t.to_local() if any_sharded([t]) else t for t in tensors]  # type: ignore[attr-defined]


def copy_(to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes, dtypes and shards."""
    torch._foreach_copy_(list(local_parts(to)), list(local_parts(of)))


def foreach(
    operation: Callable[..., Any], tensors: Sequence[Tensor], *others: Any, **options: Any
) -> list[Tensor]:
    """Call one of torch's ``_foreach`` operations; tensor by tensor if only some are sharded."""
    kinds = set(map(type, tensors))
    if len(kinds) == 1 or _sharded_type() not in kinds:
        return operation(tensors, *others, **options)
    results = []
    for i, tensor in enumerate(tensors):
        own = [[o[i]] if isinstance(o, (list, tuple)) else o for o in others]
        results.append(operation([tensor], *own, **options))
    return [result[0] for result in results if result]


def projection(of: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    """The factor c = <of, along> / ||along||^2, 0-dim, of the part of ``of`` along ``along``."""
    # By a unit vector, since the square of the norm of scaled gradients may overflow.
    norm = global_norm(along) + 1e-12
    return inner_product(of, (a / norm for a in along)) / norm


def add_scaled_(
    weights: Sequence[Tensor], direction: Sequence[Tensor], rhos: Sequence[float], norm: Tensor
) -> None:
    """Add ``rho * direction / (norm + 1e-12)`` to the weights, or nothing if norm is not finite.

    torch's fused SGD does this in one pass over the memory. Its ``found_inf`` is a tensor, so the
    host does not wait for the device.
    """
    if len(direction) != len(weights):
        raise ValueError(f"a direction of {len(direction)} tensors for {len(weights)} weights")
    found_inf = (norm * 0 != 0).float()  # inf * 0 is NaN, and NaN is not 0
    inv_norm = 1 / (norm + 1e-12)
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for w, d, rho in zip(local_parts(weights), local_parts(direction), rhos, strict=True):
        if rho != 0:
            ws, ds = kinds[w.device, w.dtype, rho]
            ws.append(w)
            ds.append(d)
    for (device, dtype, rho), (ws, ds) in kinds.items():
        step_size = (inv_norm * rho).to(device)
        if dtype in FUSED.get(device.type, ()) and all(map(_same_memory_order, ws, ds)):
            step_size = step_size.float() if device.type == "cuda" else step_size
            inf = found_inf.to(device)
            # torch.optim.SGD would call this after sorting the tensors again.
            torch._fused_sgd_(ws, ds, [], lr=step_size, found_inf=inf, maximize=True, **PLAIN)
            # Fused kernels leave this out; by it autograd refuses a graph from before the move.
            torch.autograd.graph.increment_version(ws)
        else:
            moved = found_inf.to(device) == 0
            for w, d in zip(ws, ds, strict=True):
                # where() and not a product: 0 * inf would carry a NaN into the weights
                w.add_(torch.where(moved, d * step_size, 0).to(w.dtype))


def _same_memory_order(w: Tensor, d: Tensor) -> bool:
    """Whether fused kernels, which walk over both memories at once, meet the same elements."""
    if w.dtype is not d.dtype:
        return False
    if w.is_contiguous():
        return d.is_contiguous()
    return w.stride() == d.stride() and w.is_contiguous(memory_format=torch.channels_last)
