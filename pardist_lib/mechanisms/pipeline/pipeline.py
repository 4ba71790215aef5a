"""A network in stages, one after the other on the ranks of a group: any schedule, run action by action.

Sources: Huang et al., "GPipe" (2019); Narayanan et al., "PipeDream" (2019), section 3, and "Efficient Large-Scale
Language Model Training on GPU Clusters Using Megatron-LM" (2021), section 2.2; Qi et al., "Zero Bubble Pipeline
Parallelism" (2023), for schedules whose backward is split.
"""

from contextlib import nullcontext
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import record_function

from ..collectives.agreement import check_same_model, named_tensors
from ..group import rank_and_size
from . import batches
from .messages import Mail, Routes, Shapes, needed, sent
from .stages import Stage, stage_sizes
from .state import StateDicts
from .ties import Ties


class Pipeline(StateDicts, nn.Module):
    """This rank's stages of a network, trained as `schedule` says.

    layers: the whole network, an nn.Sequential or a list of modules, the same on every rank; each rank keeps those of
    its own stages, so the others may be on the meta device. What a layer gives, a tensor or a tuple of them, the next
    one is called with. A parameter that layers on several ranks share stays one: it begins as the first of them has
    it, and its gradient is the sum of theirs.
    schedule: a `Schedule` with a row for each rank of the group.
    loss: (output, target) → the mean over a micro-batch's rows, or their sum with reduction="sum". A mean over fewer
    than all rows (ignore_index) does not add up: give the sum, and step's scale = 1/their number.
    cut: the number of layers of each stage; costs: or what each layer costs; neither: equal numbers of layers.
    checkpoint: keep a micro-batch's inputs only, and compute a stage's forward again when its backward begins.

    Its parameters are this rank's, under their names in nn.Sequential(*layers). Tensor parallelism is inside the
    layers; gradients are averaged over a data-parallel group by the caller, after `step`.

    Raises ValueError where layers, schedule and group do not fit together, or differ between ranks. Making one gives
    about 60 bytes a parameter to all_gather_object, and sends shared parameters once.
    """

    def __init__(self, layers, schedule, loss, group=None, *, cut=None, costs=None, checkpoint=False, reduction="mean"):
        super().__init__()
        layers = batches.layers_as_list(layers)
        self.schedule, self.loss, self.group, self.reduction = schedule.check(), loss, group, reduction
        self.rank, n = rank_and_size(group)
        batches.fits(schedule, n, reduction)
        sizes = stage_sizes(len(layers), schedule.stages, cut, costs)
        batches.same_everywhere([str(schedule), sizes, reduction, checkpoint], group)
        check_same_model(named_tensors(nn.Sequential(*layers)), group)

        self.last, self._rank_of, self._stages, first, owners = schedule.stages - 1, schedule.rank_of, {}, 0, []
        for stage, size in enumerate(sizes):
            if self._rank_of[stage] == self.rank:
                own = dict(enumerate(layers[first : first + size], first))
                self._stages[stage] = Stage(stage, own, checkpoint)
                for number, layer in own.items():
                    self.add_module(str(number), layer)
            first += size
            owners += size * [self._rank_of[stage]]
        if n > 1:  # nccl's first call in a group needs every rank, and a shared parameter's ends alone come first here
            dist.all_reduce(torch.zeros(1, device=device_of(self, group)), group=group)
        self._ties = Ties(layers, owners, self.rank, group)
        self._remember_names(layers)
        rows = {True: schedule.rows, False: [[a for a in row if a.kind == "F"] for row in schedule.rows]}
        self._routes = {training: Routes(rows[training], self.rank, self._rank_of) for training in rows}
        self._shapes, self._setting = Shapes(), None

    def step(self, x=None, target=None, *, seed=None, scale=1.0):
        """Forward and backward of one batch; adds to the parameters' gradients. Returns its loss, a number without a
        graph, on every rank. Under torch.no_grad() forward only.

        x: the input, a tensor or a tuple of them, wanted on the rank of the first stage; target: likewise on that of
        the last; elsewhere they are ignored. Dimension 0 is cut into the schedule's m micro-batches as
        torch.tensor_split does; or give a list of m. The loss is the mean over all rows, whichever micro-batch they
        are in. An x that requires a gradient is given one.
        seed: dropout and the like draw by seed, layer and micro-batch (`draws`): the same numbers in any pipeline.
        scale: a factor of loss and gradients, 1/k where k steps are accumulated.

        Sends, with S the bytes that one micro-batch has between two stages, S forward and S backward for each
        micro-batch and each pair of neighbouring stages on different ranks; an all-reduce of 3 + m numbers, the
        loss in a broadcast, and the gradients of shared parameters.
        """
        batch = self._batch(x, target, self.loss, seed)
        batch.weigh(batch.rows, scale, self.reduction)
        self._ties.set_aside()
        self._run(batch)
        if batch.training:
            self._ties.add_up()
            batch.hand_on_input_gradients()
        loss = batch.total(device_of(self, self.group))
        if rank_and_size(self.group)[1] > 1:
            dist.broadcast(loss, group=self.group, group_src=self._rank_of[self.last])
        return loss[0].to(batches.KINDS[int(loss[1])])

    @torch.no_grad()
    def forward(self, x=None):
        """The network's output for a batch, on the rank of the last stage; None elsewhere. Computes no gradient."""
        batch = self._batch(x)
        self._run(batch)
        return batch.output()

    # ---- action by action -----------------------------------------------------------------------------------------

    def _run(self, batch):
        marked = record_function if torch.autograd.profiler._is_profiler_enabled else nullcontext  # it costs 10 µs
        for place, action in enumerate(batch.mail.routes.row):
            __doing__ = f"{action}, place {place} of its row in the schedule"  # a hang's report says so, too
            try:
                batch.mail.post(place)
                key = needed(action, self.last)
                arrived = None if key is None else batch.mail.take(key)
                with marked(f"pipeline {action}"):  # without the wait
                    self._do(action, batch, self._stages[action.stage], action.micro_batch, arrived)
            except Exception as error:
                error.add_note(f"in {__doing__}{batches.advice(error)}")
                raise
        batch.mail.end()

    def _do(self, action, batch, stage, i, arrived):
        if action.kind == "F":
            self._forward(action, batch, stage, i, arrived)
        elif action.kind == "W":
            stage.backward_to_weights(i)
        else:
            self._backward(action, batch, stage, i, arrived)

    def _forward(self, action, batch, stage, i, tensors):
        if action.stage == 0:
            tensors, packed = batch.inputs[i]
            flags = [t.requires_grad for t in tensors]
        else:
            packed, flags = self._shapes.received(action.stage, i)
        inputs = [t.detach().requires_grad_(flag and batch.training) for t, flag in zip(tensors, flags, strict=True)]
        loss = batch.loss_of(i) if action.stage == self.last else None
        outputs, packed = stage.forward(i, inputs, packed, loss, batch.seed)
        if action.stage == self.last:
            batch.results[i] = [t.detach() for t in outputs], packed
        else:
            header = self._shapes.tell(action.stage + 1, i, outputs, packed)
            batch.mail.give(*sent(action, self._rank_of), outputs, header)

    def _backward(self, action, batch, stage, i, gradients):
        if action.stage == self.last:
            gradients = [torch.full_like(loss, batch.weights[i]) for loss in batch.results[i][0]]
        found = (stage.backward if action.kind == "B" else stage.backward_to_inputs)(i, gradients)
        if action.stage == 0:
            batch.input_gradients[i] = found
        else:
            batch.mail.give(*sent(action, self._rank_of), found)

    # ---- before the first action ----------------------------------------------------------------------------------

    def _batch(self, x, target=None, loss=None, seed=None):
        m, first, last = self.schedule.micro_batches, 0 in self._stages, self.last in self._stages
        batch = batches.Batch(m, x, target, loss, seed, first, last)
        device = device_of(self, self.group)
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        setting = [batch.kinds(), self.training, autocast, [p.requires_grad for p in self.parameters()]]
        batch.rows, changed = batches.agree(batch, setting != self._setting, self.group, device)
        self._setting = setting
        if changed:  # on any rank, and shapes may be others now
            self._shapes = Shapes()
        self._shapes.begin(batch.rows, batch.training)
        batch.mail = Mail(self._routes[batch.training], self._shapes, self.group, device)
        for stage in self._stages.values():
            stage.held.clear()  # of a step that raised
        return batch

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm, norm_type=2.0):
        """torch.nn.utils.clip_grad_norm_ for the whole network, a shared parameter counted once. Returns the norm, the
        same on every rank. An all-reduce of one number. RuntimeError where tensor parallelism has split a stage."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = self._ties.norm(parameters, norm_type, device_of(self, self.group))
        for p in parameters:
            p.grad.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0).to(p.grad.dtype))
        return norm


def device_of(module, group):
    """Where a module computes; for one without parameters, where its group sends."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    if tensor is not None:
        return tensor.device
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
