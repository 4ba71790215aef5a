"""One solution for each exercise of lesson 13; signature and docstring are the blank in the notebook."""


def ring_pays_from(n: int, latency: float, bandwidth: float) -> float:
    """The size in bytes from which a ring all-reduce is faster than recursive doubling, on n ranks.

    n: a power of two, 2 or more. latency: α, seconds a message. bandwidth: β, bytes a second.
    Ring: 2(n - 1) messages of S/n bytes, one after the other. Recursive doubling: log2(n) messages
    of S bytes. Adding up takes no time.
    Returns S in bytes, where both take equally long; math.inf where the ring is slower at every
    size.
    """
    steps, rounds = 2 * (n - 1), n.bit_length() - 1
    saved = rounds - steps / n  # bytes that the ring does not send, for each byte of the tensor
    return (steps - rounds) * latency * bandwidth / saved if saved > 0 else float("inf")


def bubble_share(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """The share of a whole step (0 to 1) in which a stage of a pipeline has nothing to do.

    stages: p. micro_batches: m in a step. chunks: v of each stage (interleaved schedule); then each
    stage's work on a micro-batch is v pieces, each 1/v as long, and a micro-batch goes v times
    through all stages.
    A stage works on all of its pieces, and waits as long as it takes one piece to go through the
    other stages, forward and backward. The whole step is work and waiting together.
    """
    work, waiting = micro_batches * chunks, stages - 1  # in pieces
    return waiting / (work + waiting)


def tensor_parallel_bytes(
    batch: int, sequence: int, hidden: int, n: int, element: int = 2, recompute: bool = False
) -> float:
    """Bytes that one rank sends in a training step for a transformer layer split over n ranks.

    batch, sequence: tokens of the micro-batch; hidden: width of the layer's input; element: bytes
    of a number.
    Attention and MLP each all-reduce their output in forward, and the gradient of their input in
    backward; each all-reduce is a ring on a tensor of the layer's input's size (nothing rounded).
    recompute: forward is run once more for backward, its all-reduces too.
    """
    size = batch * sequence * hidden * element
    all_reduces = 2 + 2 + (2 if recompute else 0)
    return all_reduces * 2 * (n - 1) / n * size


def fewest_ranks(parameters: int, memory: int, stage: int) -> int | None:
    """The fewest data-parallel ranks on which a training state fits into `memory` bytes each.

    Mixed precision with Adam: 2 bytes a parameter for the weight, 2 for the gradient, 12 for the
    optimizer. stage: of ZeRO. 0: every rank holds all; 1: the optimizer's part is shared by all
    ranks; 2: the gradients' too; 3: the weights' too. A rank that is exactly full fits.
    Returns None where no number of ranks is enough.
    """
    shared = parameters * (0, 12, 14, 16)[stage]
    room = memory - (16 * parameters - shared)  # for a rank's share
    if shared == 0:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else None
