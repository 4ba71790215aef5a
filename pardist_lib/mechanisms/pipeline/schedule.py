"""The table that says which rank computes what, in which order; what is known of it before anything has run.

Each rank works through its row from left to right, and waits where it needs what another rank has not yet sent.
"""

from html import escape

from . import simulate
from .action import read_action
from .chart import Chart
from .checks import check


class Schedule:
    """rows: for each rank the actions in their order, as Action or as text ("2F0"); None and "" are left out.

    It shows itself as a chart of who computes when. Raises ValueError, naming rank and place, for what is no action.

    rows: [[Action, …] of each rank]; ranks: p, stages, micro_batches: m, their numbers; rank_of: [each stage's rank].
    """

    def __init__(self, rows):
        rows = list(rows)
        if any(isinstance(row, str) for row in rows):
            raise ValueError("rows are lists of actions: Schedule.parse(text) reads a table that is a text")
        read = [[read_action(cell, rank, place) for place, cell in enumerate(row)] for rank, row in enumerate(rows)]
        self.rows = [[action for action in row if action] for row in read]

    @classmethod
    def parse(cls, text):
        """The schedule that a text says: a line for each rank, actions between commas or blanks.

        It reads the CSV files of torch.distributed.pipelining. Empty cells are idle. What torch writes between the
        actions (SEND_F, RECV_F, SEND_B, RECV_B, UNSHARD, RESHARD, REDUCE_GRAD) is left out: it follows from them.
        Raises ValueError, naming rank and place, for what is no action.
        """
        lines = text.strip().splitlines()
        return cls([line.split("," if "," in line else None) for line in lines])

    def __str__(self):
        """A line for each rank, with commas: the CSV that torch's pipelines load as "compute_only"."""
        return "\n".join(",".join(map(str, row)) for row in self.rows)

    def check(self):
        """The schedule itself, if p ranks can run it to its end.

        Raises ValueError, naming rank and place (in `rows`, from 0): a rank without actions; a stage that is missing
        or on two ranks; an action that is missing or there twice; a backward that is both whole and in halves, or
        before its forward, or a W before its I; ranks that wait for each other in a circle.
        """
        check(self)
        return self

    def times(self, F, I, W, message=0):  # noqa: E741 - the field's letters
        """[[(action, start, end), …] of each rank], in seconds from the start, each as early as it can be.

        F, I, W: seconds of one micro-batch's forward, backward to the input and backward to the weights through all
        stages of a rank, of which a stage of v takes 1/v; or a list with each stage's own. B takes I + W.
        message: seconds from the end of a stage to the start of the next one, if that is on another rank; who sends
        goes on meanwhile. Raises ValueError as check(), and for times that cannot be.
        """
        check(self)
        return simulate.run(self, simulate.seconds_of(self, F, I, W), simulate.not_negative("message", message))

    def makespan(self, F, I, W, message=0):  # noqa: E741
        """Seconds of the whole run, from the first start to the last end. Arguments and errors: as `times`."""
        return max(end for row in self.times(F, I, W, message) for _, _, end in row)

    def bubble(self, F, I, W, message=0):  # noqa: E741
        """The share of time in which a rank has nothing to do: (T − m·(F + I + W)) / T.

        T: the longest span of a rank, from the start of its first action to the end of its last. Where stages differ,
        m·(F + I + W) is the work of the rank that has most. Arguments and errors: as `times`.
        Source: Qi et al., "Zero Bubble Pipeline Parallelism" (2023), table 5.
        """
        span = max(row[-1][2] - row[0][1] for row in self.times(F, I, W, message))
        work = self.micro_batches * max(simulate.seconds_of_ranks(self, F, I, W))
        return max(0.0, (span - work) / span) if span else 0.0

    def in_flight(self):
        """[the most micro-batches that each rank holds at once], from the order of its row alone.

        What a stage keeps of a micro-batch it keeps from F to B, or to W; a rank with several stages counts it for
        each of them.
        """
        return [simulate.most_held(row) for row in self.rows]

    def chart(self, F=1, I=1, W=1, message=0, *, scale=None):  # noqa: E741
        """The picture of `times`: a line for each rank, a box for each action. With F = I = W = 1 a schedule shows so.

        scale: pixels a second, the same for pictures that are compared; None for as many as the words in the boxes
        need. The other arguments and errors: as `times`.
        """
        p, m, held = self.ranks, self.micro_batches, ", ".join(map(str, self.in_flight()))
        bubble = f"{100 * self.bubble(F, I, W, message):.1f} %"
        time = f"{self.makespan(F, I, W, message):,.6g}"
        words = f"{p} ranks, {m} micro-batches: time {time}, bubble {bubble}, in flight {held}"
        return Chart(self.times(F, I, W, message), words, scale)

    def _repr_html_(self):
        try:
            return self.chart()._repr_html_()
        except ValueError as error:  # a table that cannot run: its rows, and why
            return f"<pre>{escape(repr(self))}\n\n{escape(str(error))}</pre>"

    @property
    def ranks(self):
        return len(self.rows)

    @property
    def stages(self):
        return 1 + max((action.stage for row in self.rows for action in row), default=-1)

    @property
    def micro_batches(self):
        return 1 + max((action.micro_batch for row in self.rows for action in row), default=-1)

    @property
    def rank_of(self):
        home = {action.stage: rank for rank, row in enumerate(self.rows) for action in row}
        return [home.get(stage) for stage in range(self.stages)]

    def __eq__(self, other):
        return self.rows == other.rows if isinstance(other, Schedule) else NotImplemented

    def __repr__(self):
        many = f"{self.ranks} ranks, {self.stages} stages, {self.micro_batches} micro-batches"
        rows = [f"rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.rows)]
        return "\n".join([f"Schedule of {many}", *rows])
