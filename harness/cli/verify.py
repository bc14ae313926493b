from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .main import State


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-4,
    show_default=True,
    help="Largest relative difference of a metric that still counts as the same.",
)
@click.option("--device", help="Run on this device instead of the report's own choice.")
@click.pass_obj
def command(state: State, folder: Path, tolerance: float, device: str | None) -> int:
    """Run again what a report claims and say what differs.

    Exit code 0: the same, bit for bit or within the tolerance; 1: something differs or failed.
    """
    import tempfile

    from ..artifacts import Table
    from ..errors import ConfigError
    from ..experiment import Experiment, RunSpec
    from .execute import execute

    path = folder / "report.json" if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        claims = content["runs"]
        if not claims:
            raise ConfigError(f"{path}: it reports no runs")
        for claim in claims:
            check(claim)
        specs = [RunSpec.model_validate(claim["spec"]) for claim in claims]
        for claim in claims:
            differences(claim, claim, tolerance, claim.get("tables"))  # which reads all that is compared once the runs are done
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name the folder of a report that has report.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a report of this harness ({type(error).__name__})") from None
    named = list(dict.fromkeys(str(name) for claim in claims for name in claim.get("registries", ())))
    used = {Path(name).name for name in state.used_registries()}  # a copy may lie elsewhere
    if any(Path(name).name not in used for name in named):
        # Not read by itself: a registry names code to run, and a report may come from anybody.
        given = " ".join(f"-r {name}" for name in named)
        click.echo(f"warning: the report was made with {given}; if you trust it, run `harness {given} verify {folder}`", err=True)
    if device:
        specs = [spec.model_copy(update={"device": device}) for spec in specs]
    different = failed = 0
    with tempfile.TemporaryDirectory(prefix="harness-verify-") as root:
        # A store of its own: nothing is reused, nothing of the user's is touched.
        store = Path(root)
        _, outcomes = execute(state, Experiment("verify", tuple(specs)), tracking_uri=f"sqlite:///{store / 'mlflow.db'}", root=store)
        for claim, outcome in zip(claims, outcomes, strict=True):
            tables = {a.name: outcome.run.artifact(a.name) for a in outcome.run.record.artifacts if a.kind == "table"}
            made = {name: {"columns": t.columns, "rows": t.rows} for name, t in tables.items() if isinstance(t, Table)}
            problems = differences(claim, json.loads(outcome.run.record.model_dump_json()), tolerance, made)
            different += any(p.startswith(("differs", "failed:")) for p in problems)
            failed += outcome.failed
            click.echo(f"{outcome.spec.label()}: {'; '.join(problems)}")
    click.echo(f"{len(claims) - different} of {len(claims)} runs as the report claims")
    return 1 if different or failed else 0


LARGEST = 1e100  # whose square is a number still


def check(claim: dict[str, Any]) -> None:
    """ValueError where what is compared is not made of numbers: a report may come from anybody."""
    values = [m["value"] for m in claim["metrics"]]
    values += [v for m in claim["metrics"] for v in m.get("per_image") or ()]
    for artifact in claim["artifacts"]:
        for numbers in artifact.get("summary", {}).values():
            if len(numbers) != 3:
                raise ValueError("a summary has three numbers")
            values += numbers
    if any(isinstance(v, bool) or not (v is None or isinstance(v, int | float)) for v in values):
        raise ValueError("a metric is a number")
    for table in claim.get("tables", {}).values():
        for row in table["rows"]:
            if len(row) != len(table["columns"]) or not all(v is None or isinstance(v, str | int | float) for v in row):
                raise ValueError("a row has a text or a number for each column")
            values += row
    if any(isinstance(v, int | float) and abs(v) > LARGEST for v in values if not isinstance(v, float) or math.isfinite(v)):
        raise ValueError("a number is too large to be compared")


def differences(claim: dict[str, Any], record: dict[str, Any], tolerance: float, tables: Mapping[str, Any] | None = None) -> list[str]:
    """What a new run, its record and its tables, has in common with a reported one, in words; those that begin with 'differs' or
    'failed:' count."""
    if claim["status"] != record["status"]:
        return [f"differs: was {claim['status']}, is {record['status']}"]
    was, now = ((r.get("error") or {}).get("message", "") for r in (claim, record))
    if record["status"] == "failed":
        return [f"failed as before: {now}" if was == now else f"failed: {now}; before: {was}"]
    if was != now:
        return [f"differs: was {record['status']} as {was!r}, is as {now!r}"]
    found = []
    if claim["key"] != record["key"]:
        found.append("other inputs (parameters, code, device or harness version) than the report's")
        facts = (("weights", "model", "weights"), ("data", "dataset", "fingerprint"))
        for what, part, name in facts:
            a, b = ((r.get(part) or {}).get(name, "") for r in (claim, record))
            if a != b:
                found.append(f"differs: {what} were {a[:16]}, are {b[:16]}")
    old, new = ({m["name"]: m["value"] for m in r["metrics"]} for r in (claim, record))
    for name in old.keys() | new.keys():
        a, b = old.get(name), new.get(name)
        if not near(a, b, tolerance):
            found.append(f"differs: {name} was {a}, is {b}")
    each, every = ({m["name"]: m.get("per_image") or [] for m in r["metrics"]} for r in (claim, record))
    found += [
        f"differs: the values of {name!r}, picture by picture"
        for name in sorted(each.keys() & every.keys())
        if not column_near(each[name], every[name], tolerance)
    ]
    before, after = ({a["name"]: a for a in r["artifacts"]} for r in (claim, record))
    if before.keys() != after.keys():
        found.append(f"differs: artifacts were {', '.join(sorted(before))}, are {', '.join(sorted(after))}")
        return found
    changed = sorted(n for n in before if before[n]["sha256"] != after[n]["sha256"])
    shown, tables = claim.get("tables", {}), tables or {}
    apart = [n for n in shown.keys() & tables.keys() if not table_near(shown[n], tables[n], tolerance)]
    found += [f"differs: the table {name!r}" for name in sorted(apart)]
    others = [
        n
        for n in changed
        if n not in shown.keys() & tables.keys() and not close(before[n].get("summary", {}), after[n].get("summary", {}), tolerance)
    ]
    found += [f"differs: the numbers of {name!r} (mean, size) are not within {tolerance:g}" for name in others]
    apart += others
    if not changed:
        return found if any(text.startswith("differs") for text in found) else [*found, "same bits"]
    if len(changed) > len(apart):
        found.append(f"within tolerance, other bits in {', '.join(n for n in changed if n not in apart)}")
    return found


def near(a: Any, b: Any, tolerance: float, size: float = 0.0) -> bool:
    """Alike as text, or as numbers within the share `tolerance` of the larger, or of `size`; what is not a number is near nothing."""
    if isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool) and not isinstance(b, bool):
        return a == b or (math.isfinite(a) and math.isfinite(b) and abs(a - b) <= tolerance * max(abs(a), abs(b), size))
    return bool(a == b)


def column_near(old: Sequence[Any], new: Sequence[Any], tolerance: float) -> bool:
    """Whether values agree one by one, numbers relative to their root mean square."""
    numbers = [float(v) for v in old if isinstance(v, int | float) and not isinstance(v, bool)]
    size = math.sqrt(sum(v * v for v in numbers) / len(numbers)) if numbers else 0.0
    return len(old) == len(new) and all(near(a, b, tolerance, size) for a, b in zip(old, new, strict=True))


def table_near(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> bool:
    """Whether two tables agree column by column."""
    if list(old["columns"]) != list(new["columns"]) or len(old["rows"]) != len(new["rows"]):
        return False
    pairs = zip(zip(*old["rows"], strict=True), zip(*new["rows"], strict=True), strict=True)
    return all(column_near(a, b, tolerance) for a, b in pairs)


def close(old: dict[str, list[float]], new: dict[str, list[float]], tolerance: float) -> bool:
    """Whether each array's mean, root mean square and largest magnitude agree, relative to its root mean square."""
    if old.keys() != new.keys() or not old:
        return False
    return all(near(a, b, tolerance, old[n][1]) for n in old for a, b in zip(old[n], new[n], strict=True))
