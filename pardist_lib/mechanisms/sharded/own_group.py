"""A second process group of the same ranks, so that messages of two kinds cannot be taken for one another."""

import torch.distributed as dist
from torch.distributed import distributed_c10d


def own_group(group=None):
    """A process group of the ranks of `group`, made by the first call and kept as long as the process: it has threads
    and connections of its own. Every rank of `group`, and no other, has to call it.

    group: a process group; None for all ranks. Sends nothing but addresses.
    """
    # Why not dist.new_group: ranks outside of `group` would have to call it, too. With use_local_synchronization=True
    # they need not, but torch then names the group by its ranks and by how many groups this rank has made: ranks that
    # are in different numbers of groups wait for each other under different names, and never meet. dist.split_group
    # has names with the same fault, and gloo does not support it. So this does what new_group does inside, under a
    # name that all members know alike. It leaves the count alone from which dist.new_group takes its names.
    group = group or dist.group.WORLD
    name = f"{group.group_name}.own"
    world = distributed_c10d._world
    if _made.get(name) not in world.pg_map:  # or the world that it was made in has ended
        backend, store = world.pg_map[group]
        members, backend = dist.get_process_group_ranks(group), dist.Backend(backend)
        timeout = distributed_c10d._get_default_timeout(backend)
        _made[name], _ = distributed_c10d._new_process_group_helper(
            len(members), dist.get_rank(group), members, backend, store, name, timeout=timeout
        )
        world.pg_group_ranks[_made[name]] = {member: i for i, member in enumerate(members)}
    return _made[name]


_made = {}
