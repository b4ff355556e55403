"""Process groups: what an argument may be, and gathering."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, Union

from torch import Tensor, distributed

from .checks import described

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# What arguments called *_group take.
GroupLike: TypeAlias = Union["ProcessGroup", "DeviceMesh"]


def check_group(name: str, group: object) -> ProcessGroup:
    """The process group that ``group`` is: itself, or that of a one-dimensional DeviceMesh.

    Raises:
        TypeError: neither.
        ValueError: a mesh of several dimensions, or a group without this rank.
    """
    expected = "expected a torch.distributed process group or a DeviceMesh of one dimension"
    if not distributed.is_available():
        raise TypeError(f"{name}: {expected}, got {described(group)} where torch.distributed is not available")
    from torch.distributed.device_mesh import DeviceMesh

    outside = f"{name}: expected a group that this process belongs to, got one of other ranks"
    if group is distributed.GroupMember.NON_GROUP_MEMBER:  # new_group's answer to those that are not in it
        raise ValueError(outside)
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{name}: {expected}, got {group}; take mesh['name'] of it")
        if group.get_coordinate() is None:
            raise ValueError(f"{outside}, {group.mesh.tolist()}")
        return group.get_group()
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"{name}: {expected}, got {described(group)}")
    if distributed.get_rank(group) < 0:
        raise ValueError(f"{outside}, {distributed.get_process_group_ranks(group)}")
    return group


def all_gathered(value: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's contiguous ``value`` [...], as [W, ...]; no autograd."""
    ranks = distributed.get_world_size(group)
    every = value.new_empty((ranks * len(value), *value.shape[1:]))  # gloo takes no other shape
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # PyTorch < 2.13
    gather(every, value, group=group)
    return every.view(ranks, *value.shape)
