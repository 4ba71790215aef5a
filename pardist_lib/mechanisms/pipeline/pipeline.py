"""A network in stages, one after the other on the ranks of a group: any schedule, run action by action.

Sources: Huang et al., "GPipe" (2019); Narayanan et al., "PipeDream" (2019), section 3, and "Efficient Large-Scale
Language Model Training on GPU Clusters Using Megatron-LM" (2021), section 2.2; Qi et al., "Zero Bubble Pipeline
Parallelism" (2023), for schedules whose backward is split.
"""

from contextlib import nullcontext
from functools import partial
from itertools import chain
from types import SimpleNamespace

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
    loss: (output, target) → the mean over a micro-batch's rows, or their sum with reduction="sum".
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
        batch = self._begin(x, target, seed, scale)
        self._ties.set_aside()
        self._run(batch)
        return self._end(batch)

    @torch.no_grad()
    def forward(self, x=None):
        """The network's output for a batch, on the rank of the last stage; None elsewhere. Computes no gradient."""
        batch = self._begin(x)
        self._run(batch)
        return batches.together([batch.results[i] for i in sorted(batch.results)])

    # ---- action by action -----------------------------------------------------------------------------------------

    def _run(self, batch):
        marked = record_function if torch.autograd.profiler._is_profiler_enabled else nullcontext  # it costs 10 µs
        do = {"F": self._forward, "B": self._backward, "I": self._backward, "W": self._backward_to_weights}
        for place, action in enumerate(batch.mail.routes.row):
            __doing__ = f"{action}, place {place} of its row in the schedule"  # a hang's report says so, too
            try:
                batch.mail.post(place)
                with marked(f"pipeline {action}"):
                    do[action.kind](batch, self._stages[action.stage], action, action.micro_batch)
            except Exception as error:
                error.add_note(f"in {__doing__}{batches.advice(error)}")
                raise
        batch.mail.end()

    def _forward(self, batch, stage, action, i):
        if action.stage == 0:
            tensors, packed = batch.inputs[i]
            flags = [t.requires_grad for t in tensors]
        else:
            tensors = batch.mail.take(needed(action, self.last))
            packed, flags = self._shapes.received(action.stage, i)
        inputs = [t.detach().requires_grad_(flag and batch.training) for t, flag in zip(tensors, flags, strict=True)]
        outputs, packed = stage.forward(i, inputs, packed, batch.losses.get((action.stage, i)), batch.seed)
        if action.stage == self.last:
            batch.results[i] = [t.detach() for t in outputs], packed
        else:
            header = self._shapes.tell(action.stage + 1, i, outputs, packed)
            batch.mail.give(*sent(action, self._rank_of), outputs, header)

    def _backward(self, batch, stage, action, i):
        if action.stage == self.last:
            gradients = [torch.full_like(loss, batch.weights[i]) for loss in batch.results[i][0]]
        else:
            gradients = batch.mail.take(needed(action, self.last))
        found = (stage.backward if action.kind == "B" else stage.backward_to_inputs)(i, gradients)
        if action.stage == 0:
            batch.input_gradients[i] = found
        else:
            batch.mail.give(*sent(action, self._rank_of), found)

    def _backward_to_weights(self, batch, stage, action, i):
        stage.backward_to_weights(i)

    # ---- before and after -----------------------------------------------------------------------------------------

    def _begin(self, x, target=None, seed=None, scale=None):
        """What all ranks have to know of a batch, and what this one has of it. Without a scale there is no loss."""
        m, training, rows, kinds = self.schedule.micro_batches, torch.is_grad_enabled(), None, None
        batch = SimpleNamespace(training=training, seed=seed, inputs=[], losses={}, results={}, input_gradients={})
        if 0 in self._stages:
            batch.inputs = batches.micro_batches(x, m, "x", "first")
            rows = [len(tensors[0]) for tensors, _ in batch.inputs]
            kinds = [(t.shape[1:], t.dtype, t.requires_grad) for tensors, _ in batch.inputs for t in tensors]
        rows = self._agree(rows or [0] * m, training, [kinds, scale is None])
        if self.last in self._stages and scale is not None:
            targets = batches.micro_batches(target, m, "target", "last")
            batches.targets_fit(targets, rows)
            for i, (tensors, packed) in enumerate(targets):
                batch.losses[self.last, i] = partial(self._loss_of, target=tuple(tensors) if packed else tensors[0])
        if scale is not None:
            batch.weights = [scale * (r / sum(rows) if self.reduction == "mean" else 1.0) for r in rows]
        self._shapes.begin(rows, training)
        batch.mail = Mail(self._routes[training], self._shapes, self.group, self._device())
        for stage in self._stages.values():
            stage.held.clear()  # of a step that raised
        return batch

    def _agree(self, rows, training, setting):
        """The rows of every micro-batch, which the first stage's rank knows. Where anything has changed on any rank on
        which shapes may depend, all forget the shapes that they know."""
        device = self._device()
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        setting = [setting, self.training, autocast, [p.requires_grad for p in self.parameters()]]
        told = torch.tensor([setting != self._setting, training, not training, *rows], device=device)
        self._setting = setting
        if rank_and_size(self.group)[1] > 1:
            dist.all_reduce(told, dist.ReduceOp.MAX, self.group)
        changed, some_train, some_do_not, *rows = told.tolist()
        if some_train and some_do_not:
            how = "with" if training else "under torch.no_grad(), without"
            raise ValueError(f"rank {self.rank} of the group calls this {how} gradients, and another does not")
        if changed:
            self._shapes = Shapes()
        return rows

    def _loss_of(self, output, target):
        loss = self.loss(output, target)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shape = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
            raise ValueError(
                f"the loss of a micro-batch has to be a single number, and this one gives {shape}: take its mean, or "
                'its sum with reduction="sum"'
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError("the loss requires no gradient: everything is frozen. Evaluate under torch.no_grad()")
        return loss

    def _end(self, batch):
        """Shared parameters' gradients, the input's; the loss, from the last stage's rank to all."""
        if batch.training:
            self._ties.add_up()
            pairs = [
                (t, g)
                for i, found in batch.input_gradients.items()
                for t, g in zip([t for t in batch.inputs[i][0] if t.requires_grad], found, strict=True)
            ]
            if pairs:
                torch.autograd.backward(*zip(*pairs, strict=True))
        kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
        loss = torch.zeros(2, dtype=torch.float64, device=self._device())
        for i, ([one], _) in batch.results.items():
            loss[0] += one.double().squeeze() * batch.weights[i]
            loss[1] = kinds.index(one.dtype)
        if rank_and_size(self.group)[1] > 1:
            dist.broadcast(loss, group=self.group, group_src=self._rank_of[self.last])
        return loss[0].to(kinds[int(loss[1])])

    def _device(self):
        tensor = next(chain(self.parameters(), self.buffers()), None)
        if tensor is not None:
            return tensor.device
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm, norm_type=2.0):
        """torch.nn.utils.clip_grad_norm_ for the whole network, a shared parameter counted once. Returns the norm, the
        same on every rank. An all-reduce of one number."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        counted = [p.grad for p in self.parameters() if p.grad is not None and self._ties.counts_here(p)]
        norm = nn.utils.get_total_norm(counted, norm_type).to(self._device(), torch.float64)
        if norm_type == float("inf"):
            dist.all_reduce(norm, dist.ReduceOp.MAX, self.group)
        else:
            norm = norm**norm_type
            dist.all_reduce(norm, group=self.group)
            norm = norm ** (1 / norm_type)
        for gradient in gradients:
            gradient.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0).to(gradient.dtype))
        return norm
