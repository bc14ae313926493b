"""Curves and scatter plots as SVG, the same bytes each time."""

from __future__ import annotations

import io
from typing import Any

from harness.artifacts import Curve, Scatter

_STYLE = {
    "svg.hashsalt": "vision-harness",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a '$' in a class name is a '$'
}


def _figure(draw: Any) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.0, 2.8))
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def curve(artifact: Curve) -> bytes:
    def draw(axes: Any) -> None:
        for label, line in artifact.lines.items():
            axes.plot(artifact.x, line, label=label, linewidth=1.4)
        axes.set(
            xlabel=artifact.x_label,
            ylabel=artifact.y_label,
            xscale="log" if artifact.log_x else "linear",
            yscale="log" if artifact.log_y else "linear",
        )
        if 1 < len(artifact.lines) <= 12:
            axes.legend(frameon=False, fontsize=8)

    return _figure(draw)


def scatter(artifact: Scatter) -> bytes:
    def draw(axes: Any) -> None:
        import matplotlib

        colours = matplotlib.colormaps["tab20"](range(20))
        for i, name in enumerate(artifact.groups or ("",)):
            points = artifact.points[artifact.group == i]
            axes.scatter(points[:, 0], points[:, 1], s=8, color=[colours[i % len(colours)]], label=name, linewidths=0)
        axes.set(xlabel=artifact.x_label, ylabel=artifact.y_label)
        if 1 < len(artifact.groups) <= 20:
            axes.legend(frameon=False, fontsize=7, markerscale=1.5, ncols=2)

    return _figure(draw)
