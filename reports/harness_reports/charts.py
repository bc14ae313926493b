"""Curves as SVG, scatter plots and matrices as pixels; the same each time."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from harness.artifacts import Curve, Matrix, Scatter

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


STAMP = 26  # points: the longer side of a picture at a scatter's point
COLOURS = 20
DPI = 170
LABELS = 70  # a matrix with more rows or columns is drawn without their names


def _vector(draw: Any, width: float = 6.0, height: float = 2.8) -> bytes:
    """The figure as SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _pixels(draw: Any, width: float, height: float) -> np.ndarray:
    """The figure as pixels (H, W, 3): what holds pictures or thousands of marks, which no SVG reader draws alike or fast."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI)
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def curve(artifact: Curve) -> bytes:
    return _vector(_lines(artifact), height=2.8 if len(artifact.lines) <= 14 else 3.6)


def curve_pixels(artifact: Curve) -> np.ndarray:
    """The same as pixels, for a picture outside of a report."""
    return _pixels(_lines(artifact), 6.0, 2.8)


def _lines(artifact: Curve) -> Any:
    def draw(figure: Any) -> None:
        import matplotlib.ticker

        axes = figure.add_subplot()
        many = len(artifact.lines) > 10
        colours = matplotlib.colormaps["tab20" if many else "tab10"](range(20 if many else 10))
        for i, (label, line) in enumerate(artifact.lines.items()):
            style = "-" if i < len(colours) else "--"
            axes.plot(artifact.x, line, label=label, linewidth=1.4, color=colours[i % len(colours)], linestyle=style)
        axes.set(
            xlabel=artifact.x_label,
            ylabel=artifact.y_label,
            xscale="log" if artifact.log_x else "linear",
            yscale="log" if artifact.log_y else "linear",
        )
        for axis, wide in ((axes.xaxis, artifact.log_x), (axes.yaxis, artifact.log_y)):
            if wide:  # matplotlib's own labels are formulas, which are not parsed here
                axis.set_major_formatter(matplotlib.ticker.LogFormatter())
                axis.set_minor_formatter(matplotlib.ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        if 6 < len(artifact.lines) <= 40:  # they would cover the lines
            axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=1 + (len(artifact.lines) > 20))
        elif len(artifact.lines) > 1:
            axes.legend(frameon=False, fontsize=8)

    return draw


def scatter(artifact: Scatter) -> np.ndarray:
    """Points coloured by group; more groups than colours are drawn alike, since repeated colours would say they belong together."""
    many = len(artifact.points) > 1500

    def draw(figure: Any) -> None:
        import matplotlib
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        axes = figure.add_subplot()
        few = 1 < len(artifact.groups) <= COLOURS
        names = artifact.groups if few else ("",)
        count = 10 if len(names) <= 10 else 20
        colours = matplotlib.colormaps[f"tab{count}"](range(count))
        for i, name in enumerate(names):
            points = artifact.points[artifact.group == i] if few else artifact.points
            axes.scatter(
                points[:, 0],
                points[:, 1],
                s=4 if many else 10,
                color=[colours[i]],
                label=name,
                linewidths=0,
            )
        axes.set(xlabel=artifact.x_label, ylabel=artifact.y_label)
        axes.set_aspect("equal", "datalim")
        stamps = [] if artifact.pictures is None else list(zip(artifact.pictures, artifact.pictured.tolist(), strict=True))
        for image, place in stamps:
            colour = colours[int(artifact.group[place])] if few else "#57606a"
            box = OffsetImage(
                image.transpose(1, 2, 0).squeeze(), cmap="gray", zoom=STAMP / max(image.shape[1:]), interpolation="nearest", norm=_unit()
            )
            axes.add_artist(
                AnnotationBbox(
                    box,
                    artifact.points[place],
                    xybox=(0.7 * STAMP, 0.7 * STAMP),  # beside its point, which stays to be seen
                    boxcoords="offset points",
                    pad=0.06,
                    bboxprops={"edgecolor": colour, "linewidth": 1.0, "boxstyle": "square"},
                    arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6},
                )
            )
        if few:
            axes.legend(frameon=False, fontsize=7, markerscale=1.5, loc="center left", bbox_to_anchor=(1.0, 0.5))

    side = 6.0 if artifact.pictures is not None else 4.4
    return _pixels(draw, side + 0.6, side)


def _unit() -> Any:
    from matplotlib.colors import Normalize

    return Normalize(0, 1)


def matrix(artifact: Matrix) -> np.ndarray:
    """Values as colours with a bar, row and column names where they can be read, the tree of the rows at their left."""
    rows, columns = artifact.values.shape
    named = max(rows, columns) <= LABELS
    few = max(rows, columns) <= 25
    cell, text = (0.22, 8) if few else (0.13, 6)
    tree = artifact.tree is not None and rows > 2
    width = min(9.0, max(3.0, cell * columns) + (1.2 if tree else 0) + 2.2)
    height = min(9.0, max(2.0, cell * rows) + (1.0 if named else 0.3))

    def draw(figure: Any) -> None:
        grid = figure.add_gridspec(1, 2 if tree else 1, width_ratios=[0.22, 1] if tree else [1], wspace=0.01)
        axes = figure.add_subplot(grid[0, -1])
        end = float(abs(artifact.values).max()) or 1.0
        low = -end if artifact.signed else float(artifact.values.min())
        high = end if artifact.signed else float(artifact.values.max())
        shown = axes.imshow(
            artifact.values, aspect="auto", cmap="RdBu_r" if artifact.signed else "viridis", vmin=low, vmax=high, interpolation="nearest"
        )
        axes.grid(visible=False)
        axes.set_xticks(range(columns) if named else [], [_short(c) for c in artifact.columns] if named else [], rotation=90, fontsize=text)
        axes.set_yticks(range(rows) if named else [], [_short(r) for r in artifact.rows] if named else [], fontsize=text)
        axes.yaxis.tick_right()
        figure.colorbar(shown, ax=axes, label=artifact.unit, fraction=0.04, pad=0.02, location="bottom", shrink=0.6)
        if tree:
            _tree(figure.add_subplot(grid[0, 0], sharey=axes), artifact.tree, rows)

    return _pixels(draw, width, height)


def _tree(axes: Any, tree: Any, rows: int) -> None:
    """A dendrogram whose leaves stand at the matrix's rows."""
    place = {i: float(i) for i in range(rows)}
    depth = dict.fromkeys(range(rows), 0.0)
    for i, (a, b, distance, _) in enumerate(tree.tolist()):
        left, right = int(a), int(b)
        axes.plot(
            [depth[left], distance, distance, depth[right]], [place[left], place[left], place[right], place[right]], color="#57606a", lw=0.7
        )
        place[rows + i], depth[rows + i] = (place[left] + place[right]) / 2, distance
    axes.set_xlim(float(tree[:, 2].max()) * 1.02 or 1.0, 0)
    axes.axis("off")


def _short(text: str) -> str:
    return text if len(text) <= 22 else text[:21] + "\u2026"
