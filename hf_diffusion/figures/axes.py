"""How the axes of every figure look; imports matplotlib, which takes a second."""

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter


def dress(axes: Axes, label: str | None = None) -> None:
    """A light grid behind the data, no frame above and at the right, a label of the y axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    if label is not None:
        axes.set_ylabel(label)


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with 0.2, 0.5, 1 and so on instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
