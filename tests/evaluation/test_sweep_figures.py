"""The figure of a sweep can be read."""

from itertools import pairwise

import pytest

from hf_diffusion.evaluation import sweep_figures
from hf_diffusion.evaluation.measures import Measure


@pytest.mark.parametrize("seconds", [(0.0022, 0.0039), (0.0016, 0.0049), (0.002, 0.005), (0.003, 0.003), (0.001, 3.0)])
def test_the_labels_of_the_seconds_stand_beside_each_other(seconds, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sweep_figures, "_save", lambda figure, path: drawn.append(figure))
    results = [
        {
            "settings": {"num_inference_steps": steps},
            "measures": {"fd": Measure("FD", 1.0, better="lower")},
            "seconds_per_image": s,
        }
        for steps, s in zip((1, 2), seconds)
    ]
    sweep_figures.sweep_figure(results, tmp_path / "sweep.png", "a model")
    (figure,) = drawn
    figure.draw_without_rendering()
    axis = figure.axes[1].xaxis
    low, high = sorted(figure.axes[1].get_xlim())
    boxes = [tick.label1.get_window_extent() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert boxes and all(left.x1 < right.x0 for left, right in pairwise(sorted(boxes, key=lambda box: box.x0)))
