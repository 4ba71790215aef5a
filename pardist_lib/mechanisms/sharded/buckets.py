"""Parameters whose gradients are reduced together: ZeRO-1's flat parameters, and what is known of each gradient."""

from .flat_parameter import FlatParameter
from .state import cut_local_shard


class Bucket(FlatParameter):
    """A flat parameter whose parameters have views of the flat gradient for their `.grad`.

    sent   the reduce-scatter that was started last, None before; mean: this rank's shard of the mean, its result
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.sent, self.mean, self._version = None, None, None

    def place(self, i):
        """Make `.grad` of parameter i a view of the flat gradient, unless it is one."""
        if not self._is_in_place(i):
            self.arrived.discard(i)
            self.put(i)
            self.parameters[i].grad = self.gradient_of(i)
        self.arrived.add(i)

    def place_all(self):
        """Every gradient, also one that was set by hand; zero for those that are missing."""
        if self.gradient is None:
            self.gradient = self.unsharded.new_empty(len(self.unsharded))
        for i, p in enumerate(self.parameters):
            if p.grad is not None:
                self.place(i)
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                self.gradient_of(i).zero_()

    def reduce_scatter(self, collectives):
        """Start it; again, where the gradients have changed since."""
        if self.sent is not None:
            self.sent.result()
        self._version, self.arrived = self.gradient._version, set()
        if self.mean is None:  # then it is kept: the kernel takes longer to give new memory than the sum to fill it
            self.mean = self.shard.new_empty(len(self.shard))
        self.sent = collectives.reduce_scatter(self.gradient, self.sizes, self.mean)

    def is_reduced(self):
        """Whether a reduce-scatter has been started of all gradients, as they are now."""
        if self.sent is None or self._version != self.gradient._version:
            return False
        return all(p.grad is not None and self._is_in_place(i) for i, p in enumerate(self.parameters))

    def cut_gradients(self):
        """Where gradients are averaged already: give the local shards their parts of them."""
        for local, p in zip(self.local_shards, self.parameters, strict=True):
            local.grad = None if p.grad is None else cut_local_shard(p.grad, local)

    def forget(self):
        if self.sent is not None:
            self.sent.result()  # gradients are about to be written to
        self.sent, self.arrived = None, set()

    def _is_in_place(self, i):
        gradient = self.parameters[i].grad
        return self.gradient is not None and gradient.data_ptr() == self.gradient_of(i).data_ptr()


def in_buckets(named, bucket_bytes, group=None):
    """The trainable ones of [(parameter, name)] in buckets, each of one dtype and device, and of at most `bucket_bytes`
    or one parameter; the last parameters come first, as in backward."""
    buckets, open_ones = [], {}
    for p, name in reversed(named):
        if p.requires_grad:
            kind = p.dtype, p.device
            bucket = open_ones.get(kind)
            if bucket is None or sum(q.nbytes for q, _ in bucket) + p.nbytes > bucket_bytes:
                buckets.append(bucket := [])
                open_ones[kind] = bucket
            bucket.append((p, name))
    return [Bucket(*zip(*bucket, strict=True), group) for bucket in buckets]
