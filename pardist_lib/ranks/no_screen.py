"""matplotlib's backend on a rank, which has no screen: figures are drawn and saved as ever."""

from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvas

__all__ = ["FigureCanvas", "show"]


def show(*_, **__):
    print("(a rank has no screen: return the figure and display(…) it in the notebook, or call fig.savefig(…))")
