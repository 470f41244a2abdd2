"""The rank of this worker, and the part of the model that it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Topology", "topology_of"]


@dataclass(frozen=True)
class Topology:
    """This worker's place in its engine.

    Attributes:
        rank: RANK of the configuration: unique among the workers of all data-parallel replicas.
        tp_size, tp_rank: Tensor-parallel size and place.
        pp_size, pp_rank: Pipeline-parallel size and place.
        ep_size, ep_rank: Expert-parallel size and place; 1 and 0 without expert parallelism.
        experts: How experts are distributed, as text, as far as sizes and ranks do not say it; empty for dense models.
    """

    rank: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    ep_size: int
    ep_rank: int
    experts: str


def topology_of(vllm_config: Any, model_config: Any) -> Topology:
    """Determine the place of this worker from vLLM's configuration and its parallel groups, which must be set up.

    Args:
        vllm_config: vLLM's configuration.
        model_config: The configuration of the model to load. For a draft it is not the one in `vllm_config`.
    """
    import torch
    from vllm.distributed import get_pp_group, get_tp_group

    parallel = vllm_config.parallel_config
    tensor, pipeline = get_tp_group(), get_pp_group()
    ep_size, ep_rank, experts = _experts_of(parallel, model_config, tensor)
    return Topology(
        rank=torch.distributed.get_rank() + _replica_offset(parallel),
        tp_size=tensor.world_size,
        tp_rank=tensor.rank_in_group,
        pp_size=pipeline.world_size,
        pp_rank=pipeline.rank_in_group,
        ep_size=ep_size,
        ep_rank=ep_rank,
        experts=experts,
    )


def _replica_offset(parallel: Any) -> int:
    # Data-parallel replicas of a dense model are independent engines. Each has size 1 and ranks from 0, and only the
    # index differs. Replicas that work together have distributed ranks that count all of them.
    if parallel.data_parallel_size > 1:
        return 0
    return int(parallel.data_parallel_index) * int(parallel.world_size)


def _experts_of(parallel: Any, model_config: Any, tensor: Any) -> tuple[int, int, str]:
    if not model_config.is_moe:
        return 1, 0, ""
    # Experts are distributed over data-parallel, prefill-context and tensor-parallel ranks, in this order.
    context_size = int(getattr(parallel, "prefill_context_parallel_size", 1))
    size = int(parallel.data_parallel_size) * context_size * tensor.world_size
    place = _context_rank(context_size) + int(parallel.data_parallel_rank) * context_size
    rank = place * tensor.world_size + tensor.rank_in_group
    if size == 1:
        return 1, 0, ""
    if not parallel.enable_expert_parallel:
        return 1, 0, f"cut {rank} of {size}" if size != tensor.world_size else ""
    return size, rank, str(getattr(parallel, "expert_placement_strategy", "linear"))


def _context_rank(size: int) -> int:
    if size == 1:
        return 0
    from vllm.distributed import get_pcp_group

    return int(get_pcp_group().rank_in_group)
