"""What a report shows, as plain values: one view for the HTML and the PDF.

The view is a function of the runs alone. Pictures become sources through `Assets`, which differ by format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from harness.artifacts import Arrays, Artifact, Curve, Heatmaps, Images, Matrix, Scatter, Table
from harness.experiment import RunSpec
from harness.record import ErrorFacts, MetricValue, Record, ReportInput, StoredRun

from . import charts, colour

TABLE_ROWS = 25  # longer tables are cut; report.json holds all rows
STRIP = 6  # frames of an animation in print
SMALL = 64  # pictures with a shorter side below this are enlarged pixel by pixel
INPUTS = "inputs"
OWN_SCALE = f"each map on its own scale, to the {colour.CLIP_PERCENTILE:g}th percentile of its size"


class Assets(Protocol):
    """Where pictures go: into the page, or beside it."""

    def image(self, pixels: np.ndarray, exact: bool) -> str: ...

    def svg(self, data: bytes) -> str: ...

    def animation(self, frames: list[np.ndarray], exact: bool) -> str:
        """Frames that follow one another; empty where nothing can move."""
        ...


@dataclass(frozen=True)
class Tile:
    source: str
    width: int
    height: int
    caption: str
    alt: str
    second: str = ""  # a picture shown to the right of the first: the map beside its input
    zoom: bool = False


@dataclass(frozen=True)
class Legend:
    low: str
    high: str
    unit: str
    signed: bool


@dataclass(frozen=True)
class Panel:
    """One artifact of one run."""

    model: str
    tiles: Sequence[Sequence[Tile | None]] = ()  # rows; None is an empty place
    chart: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    more: str = ""
    legend: Legend | None = None


@dataclass(frozen=True)
class Figure:
    """The same artifact of every model, side by side."""

    anchor: str
    title: str
    caption: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class MetricRow:
    name: str
    about: str
    better: str
    values: Sequence[str]
    best: Sequence[int] = ()  # columns that hold the best value


@dataclass(frozen=True)
class Problem:
    model: str
    status: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Variant:
    """Runs that differ in nothing but the model."""

    anchor: str
    dataset: str
    seed: int
    params: Sequence[tuple[str, str]]
    models: Sequence[str]
    measured: Sequence[str]  # models with metrics, in the order of their values
    metrics: Sequence[MetricRow]
    figures: Sequence[Figure]
    problems: Sequence[Problem]
    notes: Sequence[tuple[str, str]]
    commands: Sequence[str]


@dataclass(frozen=True)
class Section:
    anchor: str
    name: str
    title: str
    summary: str
    reading: str
    caveats: str
    paper: Mapping[str, Any] | None
    variants: Sequence[Variant]


@dataclass(frozen=True)
class Cell:
    status: str
    text: str
    anchor: str


@dataclass(frozen=True)
class View:
    title: str
    name: str
    command: str
    lead: str
    models: Sequence[str]
    summary: Sequence[tuple[str, str, Sequence[Cell]]]  # (technique, anchor, a cell a model)
    sections: Sequence[Section]
    facts: Sequence[tuple[str, Sequence[tuple[str, str]]]]  # provenance: (heading, rows)
    runs: Sequence[Mapping[str, str]]
    plugin_failures: Sequence[str]
    status: str
    date: str
    drawn: Mapping[str, int] = field(default_factory=dict)


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, whole numbers whole."""
    if value is None:
        return "not finite"
    text = f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def words(slug: str) -> str:
    return slug.replace("_", " ").replace(".", ", ")


def unique(items: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def build_view(report: ReportInput, assets: Assets) -> View:
    """The view of a report's runs, in their order."""
    runs = [_readable(run) for run in report.runs]
    records = [run.record for run in runs]
    models = unique([r.model.name for r in records])
    sections = [
        _section(name, [r for r in runs if r.record.technique.name == name], assets) for name in unique([r.technique.name for r in records])
    ]
    counts = {status: sum(r.status == status for r in records) for status in ("finished", "failed", "not_applicable")}
    lead = f"{len(records)} runs of {len(sections)} techniques on {_listed(models)}: {counts['finished']} finished"
    if counts["failed"]:
        lead += f", {counts['failed']} failed"
    if counts["not_applicable"]:
        lead += f", {counts['not_applicable']} not applicable"
    return View(
        title=report.title,
        name=report.name,
        command=report.command,
        lead=lead + ".",
        models=models,
        summary=[_summary(s, models, runs) for s in sections],
        sections=sections,
        facts=_provenance(records),
        runs=[_run_row(r) for r in records],
        plugin_failures=list(report.plugin_failures),
        status="failed" if counts["failed"] else "finished",
        date=max((r.started for r in records), default=""),
    )


def _readable(run: StoredRun) -> StoredRun:
    """A run whose files are missing or altered counts as failed: nothing of it can be shown."""
    damage = run.damage()
    if not damage:
        return run
    error = ErrorFacts(type="StorageError", message=damage)
    return StoredRun(run.record.model_copy(update={"status": "failed", "metrics": [], "notes": [], "error": error}), run.folder)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "no model"


def _summary(section: Section, models: Sequence[str], runs: Sequence[StoredRun]) -> tuple[str, str, list[Cell]]:
    cells = []
    for model in models:
        mine = [r.record for r in runs if r.record.technique.name == section.name and r.record.model.name == model]
        if not mine:
            cells.append(Cell("absent", "", section.anchor))
            continue
        failed = [r for r in mine if r.status == "failed"]
        first = failed[0] if failed else mine[0]
        if first.status == "finished":
            whole = [m for m in first.metrics if "." not in m.name] or first.metrics
            text = "; ".join(f"{words(m.name)} {number(m.value, m.unit)}" for m in whole[:3]) or "done"
        else:
            text = next(iter(first.error.message.splitlines() if first.error else ()), first.status)
        if len(mine) > 1:
            text += f" (one of {len(mine)} runs)"
        cells.append(Cell(first.status, text, section.anchor))
    return section.title, section.anchor, cells


def _section(name: str, runs: Sequence[StoredRun], assets: Assets) -> Section:
    facts = runs[0].record.technique
    groups: dict[str, list[StoredRun]] = {}
    for run in runs:
        r = run.record
        groups.setdefault(json.dumps([r.dataset.name if r.dataset else "", r.seed, r.params], sort_keys=True), []).append(run)
    variants = [_variant(f"{name}-{i}", group, assets) for i, group in enumerate(groups.values(), 1)]
    return Section(name, name, words(name).capitalize(), facts.summary, facts.reading, facts.caveats, facts.paper, variants)


def _variant(anchor: str, runs: Sequence[StoredRun], assets: Assets) -> Variant:
    record = runs[0].record
    done = [r for r in runs if r.record.status == "finished"]
    problems = [
        Problem(
            r.record.model.name,
            r.record.status,
            r.record.error.message if r.record.error else "",
            r.record.error.traceback if r.record.error else "",
        )
        for r in runs
        if r.record.status != "finished"
    ]
    figures: list[Figure] = []
    loaded: list[tuple[StoredRun, dict[str, Artifact]]] = []
    for run in done:
        loaded.append((run, run.all_artifacts()))
    for name in unique([n for _, artifacts in loaded for n in artifacts if n != INPUTS]):
        having = [(run, artifacts) for run, artifacts in loaded if name in artifacts]
        drawn = []
        for run, artifacts in having:
            try:
                panel = _panel(run.record, artifacts[name], artifacts.get(INPUTS), assets)
            except Exception as error:  # one odd artifact must not cost the whole report
                message = f"{words(name)} cannot be drawn: {type(error).__name__}: {error}"
                problems.append(Problem(run.record.model.name, "failed", message))
                continue
            if panel is not None:
                drawn.append(panel)
        if drawn:
            figures.append(Figure(f"{anchor}-{name}", words(name).capitalize(), having[0][1][name].caption, drawn))
    notes = [(r.record.model.name, note) for r in done for note in r.record.notes]
    return Variant(
        anchor=anchor,
        dataset=_dataset_line(record),
        seed=record.seed,
        params=[(k, plain(v)) for k, v in record.params.items()],
        models=[r.record.model.name for r in runs],
        measured=[r.record.model.name for r in done],
        metrics=_metrics(done),
        figures=figures,
        problems=problems,
        notes=notes,
        commands=[RunSpec.model_validate(r.record.spec).command(r.record.registries) for r in runs],
    )


def _dataset_line(record: Record) -> str:
    if record.dataset is None:
        return ""
    shown = len(record.dataset.selected)
    return f"{record.dataset.name}, {shown or record.dataset.pictures} picture{'s' if (shown or record.dataset.pictures) != 1 else ''}"


def _metrics(runs: Sequence[StoredRun]) -> list[MetricRow]:
    rows = []
    # 'deletion.saliency' and the like are parts of a table; side by side they serve to compare models.
    alone = len(runs) == 1
    for name in unique([m.name for r in runs for m in r.record.metrics if not (alone and "." in m.name)]):
        found: list[MetricValue | None] = [r.record.metric(name) for r in runs]
        first = next(m for m in found if m is not None)
        values = [m.value if m is not None else None for m in found]
        known = [v for v in values if v is not None]
        best: list[int] = []
        if first.better and len(set(known)) > 1:
            top = (max if first.better == "higher" else min)(known)
            best = [i for i, v in enumerate(values) if v == top]
        texts = ["" if m is None else _value(m) for m in found]
        rows.append(MetricRow(words(name), first.about, first.better, texts, best))
    return rows


def _value(metric: MetricValue) -> str:
    """'0.7' or, with a value a picture, '0.7 (s.d. 0.2, n = 20)'."""
    known = [v for v in metric.per_image if v is not None]
    text = number(metric.value, metric.unit)
    if metric.detail:
        text += f" ({metric.detail})"
    elif len(known) > 1 and not set(known) <= {0.0, 1.0}:
        text += f" (s.d. {number(float(np.std(known, ddof=1)))}, n = {len(known)})"
    elif known:
        text += f" (n = {len(known)})"
    return text


# -- artifacts -----------------------------------------------------------------------------------------------------------


def _panel(record: Record, artifact: Artifact, inputs: Artifact | None, assets: Assets) -> Panel | None:
    draw: dict[type[Artifact], Callable[[], Panel]] = {
        Images: lambda: _images(record, artifact, assets),  # type: ignore[arg-type]
        Heatmaps: lambda: _heatmaps(record, artifact, inputs, assets),  # type: ignore[arg-type]
        Curve: lambda: Panel(record.model.name, chart=assets.svg(charts.curve(artifact))),  # type: ignore[arg-type]
        Scatter: lambda: Panel(record.model.name, chart=assets.image(charts.scatter(artifact), True)),  # type: ignore[arg-type]
        Matrix: lambda: Panel(record.model.name, chart=assets.image(charts.matrix(artifact), True)),  # type: ignore[arg-type]
        Table: lambda: _table(record, artifact),  # type: ignore[arg-type]
    }
    return None if isinstance(artifact, Arrays) else draw[type(artifact)]()


def _rows(tiles: Sequence[Tile | None], columns: int) -> list[Sequence[Tile | None]]:
    return [tiles[i : i + columns] for i in range(0, len(tiles), columns)]


def _images(record: Record, artifact: Images, assets: Assets) -> Panel:
    pixels = [colour.picture(image) for image in artifact.data]
    small = min(pixels[0].shape[:2]) < SMALL
    if artifact.moving:
        return _animation(record, artifact, [colour.enlarge(p, 96) if small else p for p in pixels], artifact.exact or small, assets)
    if not artifact.captions and len(pixels) > 1:
        tiles = [colour.enlarge(p, 32) if small else p for p in pixels]
        page = colour.sheet(tiles, artifact.columns or 8, 2)
        alt = f"{words(artifact.name)} of {record.model.name}: {len(pixels)} pictures"
        return Panel(record.model.name, [[_tile(page, "", alt, artifact.exact or small, assets)]])
    captions = artifact.captions or [""] * len(pixels)
    tiles_ = [
        _tile(
            colour.enlarge(p, 96) if small else p,
            text,
            f"{words(artifact.name)} of {record.model.name}{': ' if text else ''}{text}",
            artifact.exact or small,
            assets,
        )
        for p, text in zip(pixels, captions, strict=True)
    ]
    if artifact.zoom:
        tiles_ = [replace(tile, zoom=True) for tile in tiles_]
    # Fewer pictures than columns keep their size: empty cells fill the row.
    fill: list[Tile | None] = [None] * (artifact.columns - len(tiles_))
    return Panel(record.model.name, _rows([*tiles_, *fill], artifact.columns or 4))


def _animation(record: Record, artifact: Images, frames: list[np.ndarray], exact: bool, assets: Assets) -> Panel:
    """Frames played where the page can move, otherwise a strip of some of them."""
    source = assets.animation(frames, exact)
    alt = f"{words(artifact.name)} of {record.model.name}: {len(frames)} frames"
    if source:
        return Panel(record.model.name, [[Tile(source, frames[0].shape[1], frames[0].shape[0], f"{len(frames)} frames", alt)]])
    count = min(STRIP, len(frames))
    numbers = [round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)]
    tiles = [_tile(frames[i], f"frame {i + 1} of {len(frames)}", alt, exact, assets) for i in numbers]
    return Panel(record.model.name, [tiles])


def _tile(pixels: np.ndarray, caption: str, alt: str, exact: bool, assets: Assets, second: str = "") -> Tile:
    return Tile(assets.image(pixels, exact), pixels.shape[1], pixels.shape[0], caption, alt, second)


def _heatmaps(record: Record, artifact: Heatmaps, inputs: Artifact | None, assets: Assets) -> Panel:
    ends = [colour.limit(m, artifact.signed) for m in artifact.data]
    if artifact.shared_scale:
        ends = [max(ends)] * len(ends)
    if artifact.columns and not artifact.captions:
        return _map_sheet(record, artifact, ends, assets)
    over = artifact.over or ()  # set when an artifact is built
    if artifact.columns:
        return _map_row(record, artifact, ends, inputs, assets)
    below = inputs if isinstance(inputs, Images) and over else None
    pictures = [colour.picture(below.data[i]) for i in over] if below else [None] * len(ends)
    names = [below.captions[i] if below.captions else "" for i in over] if below else [""] * len(ends)
    tiles = []
    for i, (values, end, under) in enumerate(zip(artifact.data, ends, pictures, strict=True)):
        fits = under is not None and under.shape[:2] == values.shape
        drawn = colour.balance(values, end, under if fits else None) if artifact.signed else colour.heat(values, end)
        small = min(values.shape) < SMALL
        if small:
            drawn = colour.enlarge(drawn, 96)
        own = artifact.captions[i] if artifact.captions else ""
        scale = "zero everywhere" if end == 0 else f"\u00b1{number(end)}" if artifact.signed else f"0 to {number(end)}"
        caption = "; ".join(text for text in (names[i], own, scale) if text)
        alt = f"{words(artifact.name)} of {record.model.name} for {caption}"
        second = assets.image(drawn, small)
        if under is None:
            tiles.append(Tile(second, drawn.shape[1], drawn.shape[0], caption, alt))
        else:
            shown = colour.enlarge(under, 96) if min(under.shape[:2]) < SMALL else under
            tiles.append(_tile(shown, caption, alt, small, assets, second))
    high = number(ends[0]) if artifact.shared_scale else OWN_SCALE
    legend = Legend("-" if artifact.signed else "0", high, artifact.unit, artifact.signed)
    return Panel(record.model.name, _rows(tiles, 3 if below else 5), legend=legend)


def _map_row(record: Record, artifact: Heatmaps, ends: list[float], inputs: Artifact | None, assets: Assets) -> Panel:
    """Several maps of one picture in a grid that starts with the picture."""
    tiles: list[Tile | None] = []
    over = set(artifact.over or ())
    if isinstance(inputs, Images) and len(over) == 1:
        name = inputs.captions[min(over)] if inputs.captions else ""
        shown = colour.picture(inputs.data[min(over)])
        tiles.append(_tile(_enlarged(shown, 96), name, f"the picture {name}", min(shown.shape[:2]) < SMALL, assets))
    for values, end, text in zip(artifact.data, ends, artifact.captions, strict=True):
        drawn = colour.balance(values, end, None) if artifact.signed else colour.heat(values, end)
        alt = f"{words(artifact.name)} of {record.model.name}: {text}"
        tiles.append(_tile(_enlarged(drawn, 96), text, alt, min(values.shape) < SMALL, assets))
    tiles += [None] * (artifact.columns - len(tiles))
    return Panel(
        record.model.name,
        _rows(tiles, artifact.columns),
        legend=Legend(
            "-" if artifact.signed else "0", number(ends[0]) if artifact.shared_scale else OWN_SCALE, artifact.unit, artifact.signed
        ),
    )


def _enlarged(pixels: np.ndarray, least: int) -> np.ndarray:
    return colour.enlarge(pixels, least) if min(pixels.shape[:2]) < SMALL else pixels


def _map_sheet(record: Record, artifact: Heatmaps, ends: list[float], assets: Assets) -> Panel:
    """All maps as small tiles in one picture."""
    drawn = [colour.balance(m, end, None) if artifact.signed else colour.heat(m, end) for m, end in zip(artifact.data, ends, strict=True)]
    page = colour.sheet([colour.enlarge(d, 26) for d in drawn], artifact.columns, 2)
    alt = f"{words(artifact.name)} of {record.model.name}: {len(drawn)} maps"
    sign = "\u00b1" if artifact.signed else "to "
    high = f"one scale, {sign}{number(ends[0])}" if artifact.shared_scale else OWN_SCALE
    legend = Legend("-" if artifact.signed else "0", high, artifact.unit, artifact.signed)
    return Panel(record.model.name, [[_tile(page, "", alt, True, assets)]], legend=legend)


def _table(record: Record, artifact: Table) -> Panel:
    rows = [["" if v is None else number(v) if isinstance(v, float) else str(v) for v in row] for row in artifact.rows[:TABLE_ROWS]]
    more = f"first {TABLE_ROWS} of {len(artifact.rows)} rows; report.json has all" if len(artifact.rows) > TABLE_ROWS else ""
    return Panel(record.model.name, columns=artifact.columns, rows=rows, more=more)


# -- provenance ------------------------------------------------------------------------------------------------------------


def _provenance(records: Sequence[Record]) -> list[tuple[str, list[tuple[str, str]]]]:
    def gather(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(k, v) for k, v in unique(list(pairs)) if v]

    models = gather(
        [
            (r.model.name, f"{r.model.builder}; weights {r.model.source}, {_weights(r)}; licence: {r.model.license or 'not given'}")
            for r in records
        ]
    )
    data = gather(
        [
            (r.dataset.name, f"{r.dataset.pictures} pictures, sha256 {r.dataset.fingerprint}; licence: {r.dataset.license or 'not given'}")
            for r in records
            if r.dataset
        ]
    )
    versions = gather([(k, v) for r in records for k, v in r.versions.items()])
    devices = gather(
        [
            (str(r.device.get("kind", "")), "; ".join(f"{k.replace('_', ' ')} {v}" for k, v in r.device.items() if k != "kind" and v != ""))
            for r in records
        ]
    )
    code = gather(
        [("git commit", f"{r.git['commit']}{' with uncommitted changes' if r.git.get('dirty') else ''}") for r in records if r.git]
    )
    plugins = gather(
        [
            (r.technique.name, f"version {r.technique.version}, from {r.technique.distribution} {r.technique.distribution_version}")
            for r in records
        ]
    )
    return [
        (title, rows)
        for title, rows in (
            ("Models", models), ("Data", data), ("Techniques", plugins), ("Device", devices), ("Versions", versions), ("Code", code),
        )
        if rows
    ]  # fmt: skip


def _weights(record: Record) -> str:
    return record.model.weights if record.model.weights.startswith("random") else f"sha256 {record.model.weights}"


def _run_row(record: Record) -> dict[str, str]:
    spec = RunSpec.model_validate(record.spec)
    return {
        "run": spec.label(),
        "status": words(record.status),
        "key": record.key[:12],
        "seed": str(record.seed),
        "batch": str(record.batch),
        "seconds": f"{record.seconds:.1f}",
        "memory": f"{record.peak_memory_bytes / 2**20:.0f}",
        "started": record.started,
        "command": spec.command(record.registries),
    }
