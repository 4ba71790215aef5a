"""From plain data to a picture or a widget: no tensors of torch's, no process groups."""

from .activations import activations
from .collectives import collective, ring_steps
from .figure import Picture
from .images import images
from .matmul import matmul
from .memory import memory
from .memory_over_time import memory_over_time
from .messages import messages
from .planner import plans, plans_page
from .plots import bars, curves, gradients
from .precision import float_bits, magnitudes
from .processes import process_tree
from .schedule import schedule
from .shards import held, shards
from .split_gradients import split_gradients
from .staleness import stale_gradients
from .table import Table
from .timeline import timeline
from .timeline_page import explore
from .verdict import Verdict
from .widgets import Live, contact_sheet, knobs, stepper

__all__ = [
    "Live", "Picture", "Table", "Verdict", "activations", "bars", "collective", "contact_sheet", "curves", "explore",
    "float_bits", "gradients", "held", "images", "knobs", "magnitudes", "matmul", "memory", "memory_over_time",
    "messages", "plans", "plans_page", "process_tree", "ring_steps", "schedule", "shards", "split_gradients",
    "stale_gradients", "stepper", "timeline",
]  # fmt: skip
