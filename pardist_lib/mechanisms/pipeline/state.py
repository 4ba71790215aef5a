"""Whole state dicts of a network in stages: they fit one process, and a pipeline of any other size and schedule."""

import torch.distributed as dist
from torch import nn

from ..group import rank_and_size


class StateDicts:
    """The part of Pipeline that saves and loads. `state_dict` and `load_state_dict` are this rank's layers only."""

    def _remember_names(self, layers):
        whole = nn.Sequential(*layers)
        self._names = list(whole.state_dict())
        named = list(whole.named_parameters())
        self._parameter_names = [name for name, _ in named]
        own = {id(p) for p in self.parameters()}  # the others are not kept
        self._number = {p: i for i, (_, p) in enumerate(named) if id(p) in own}  # a shared one has one number

    def _gathered(self, thing):
        everyone = [None] * rank_and_size(self.group)[1]
        dist.all_gather_object(everyone, thing, group=self.group)
        return everyone

    def full_state_dict(self):
        """nn.Sequential(*layers).state_dict(), whole, on every rank. Every rank has to call it; gives each rank's
        layers to all_gather_object."""
        found = {}
        for state in self._gathered({name: value.cpu() for name, value in self.state_dict().items()}):
            found.update(state)
        return {name: found[name] for name in self._names}

    def load_full_state_dict(self, state):
        """A whole state dict, of one process or of any pipeline, of which this rank takes its layers. Sends nothing.
        ValueError where its names are not the network's."""
        if state.keys() != set(self._names):
            raise ValueError(f"these names are in one state dict only: {sorted(state.keys() ^ set(self._names))}")
        self.load_state_dict({name: state[name] for name in self.state_dict()})

    def full_optimizer_state_dict(self, optimizer):
        """What `state_dict` of the same optimizer of nn.Sequential(*layers).parameters() would give, on every rank.
        Every rank has to call it, with an optimizer of its own parameters; groups are put together by their order."""
        local = optimizer.state_dict()
        numbers = self._numbers(optimizer)
        theirs = self._gathered((numbers, local["state"], local["param_groups"]))
        place = _places([n for n, _, _ in theirs])
        state, groups = {}, [dict(g) for g in local["param_groups"]]
        for numbers, values, _ in theirs:
            flat = [number for group in numbers for number in group]
            state.update({place[flat[i]]: value for i, value in values.items()})
        for g, group in enumerate(groups):
            members = sorted({i for n, _, _ in theirs for i in n[g]})
            group["params"] = [place[i] for i in members]
            if any("param_names" in told[g] for *_, told in theirs):
                group["param_names"] = [self._parameter_names[i] for i in members]
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_full_optimizer_state_dict(self, optimizer, state):
        """The way back, each rank taking its own parameters' part. Every rank has to call it."""
        numbers = self._numbers(optimizer)
        place = _places(self._gathered(numbers))
        flat = [place[number] for group in numbers for number in group]
        own = {i: state["state"][p] for i, p in enumerate(flat) if p in state["state"]}
        groups = [{**group, "params": []} for group in state["param_groups"]]
        if len(groups) != len(numbers):
            raise ValueError(f"this state has {len(groups)} groups of parameters, the optimizer {len(numbers)}")
        i = 0
        for group, members in zip(groups, numbers, strict=True):
            group["params"], i = list(range(i, i + len(members))), i + len(members)
            group.pop("param_names", None)  # the optimizer has its own
        optimizer.load_state_dict({"state": own, "param_groups": groups})

    def _numbers(self, optimizer):
        """For each of its groups the numbers of the parameters in the whole network."""
        groups = [[self._number.get(p) for p in group["params"]] for group in optimizer.param_groups]
        if any(number is None for group in groups for number in group):
            raise ValueError("the optimizer has parameters that are not this pipeline's: make it of its parameters()")
        return groups


def _places(everyone):
    """{number in the network: place in the whole optimizer}: group after group, in the network's order."""
    if len({len(numbers) for numbers in everyone}) > 1:
        counts = [len(numbers) for numbers in everyone]
        raise ValueError(f"the ranks' optimizers have {counts} groups of parameters: as many on each, empty ones too")
    groups = [sorted({i for numbers in everyone for i in numbers[g]}) for g in range(len(everyone[0]))]
    return {number: place for place, number in enumerate(i for group in groups for i in group)}
