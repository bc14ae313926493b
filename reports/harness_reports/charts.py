"""Curves and scatter plots as SVG, the same bytes each time."""

from __future__ import annotations

import io
from typing import Any

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
LABELS = 70  # a matrix with more rows or columns is drawn without their names


def _figure(draw: Any, width: float = 6.0, height: float = 2.8) -> bytes:
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


def curve(artifact: Curve) -> bytes:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
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
    many = len(artifact.points) > 1500

    def draw(figure: Any) -> None:
        import matplotlib
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        axes = figure.add_subplot()
        names = artifact.groups or ("",)
        count = 10 if len(names) <= 10 else 20
        colours = matplotlib.colormaps[f"tab{count}"](range(count))
        for i, name in enumerate(names):
            points = artifact.points[artifact.group == i]
            # Thousands of vector points make a page slow: they are drawn as one picture.
            axes.scatter(
                points[:, 0],
                points[:, 1],
                s=4 if many else 10,
                color=[colours[i % len(colours)]],
                label=name,
                linewidths=0,
                rasterized=many,
            )
        axes.set(xlabel=artifact.x_label, ylabel=artifact.y_label)
        axes.set_aspect("equal", "datalim")
        stamps = [] if artifact.pictures is None else list(zip(artifact.pictures, artifact.pictured.tolist(), strict=True))
        for image, place in stamps:
            colour = colours[int(artifact.group[place]) % len(colours)] if len(names) > 1 else "#57606a"
            box = OffsetImage(
                image.transpose(1, 2, 0).squeeze(), cmap="gray", zoom=STAMP / max(image.shape[1:]), interpolation="nearest", norm=_unit()
            )
            axes.add_artist(
                AnnotationBbox(
                    box, artifact.points[place], pad=0.06, bboxprops={"edgecolor": colour, "linewidth": 1.0, "boxstyle": "square"}
                )
            )
        if 1 < len(names) <= 20:
            axes.legend(frameon=False, fontsize=7, markerscale=1.5, loc="center left", bbox_to_anchor=(1.0, 0.5))

    side = 6.0 if artifact.pictures is not None else 4.4
    return _figure(draw, side + 0.6, side)


def _unit() -> Any:
    from matplotlib.colors import Normalize

    return Normalize(0, 1)


def matrix(artifact: Matrix) -> bytes:
    """Values as colours with a bar, row and column names where they can be read, the tree of the rows at their left."""
    rows, columns = artifact.values.shape
    named = max(rows, columns) <= LABELS
    cell = 0.2 if max(rows, columns) <= 25 else 0.13
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
        axes.set_xticks(range(columns) if named else [], [_short(c) for c in artifact.columns] if named else [], rotation=90, fontsize=6)
        axes.set_yticks(range(rows) if named else [], [_short(r) for r in artifact.rows] if named else [], fontsize=6)
        axes.yaxis.tick_right()
        figure.colorbar(shown, ax=axes, label=artifact.unit, fraction=0.04, pad=0.02, location="bottom", shrink=0.6)
        if tree:
            _tree(figure.add_subplot(grid[0, 0], sharey=axes), artifact.tree, rows)

    return _figure(draw, width, height)


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
