from __future__ import annotations

import json
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

    from ..errors import ConfigError
    from ..experiment import Experiment, RunSpec
    from .execute import execute

    path = folder / "report.json" if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        claims = content["runs"]
        specs = [RunSpec.model_validate(claim["spec"]) for claim in claims]
        for claim in claims:
            differences(claim, claim, tolerance)  # which reads all that is compared once the runs are done
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
    different = 0
    with tempfile.TemporaryDirectory(prefix="harness-verify-") as root:
        # A store of its own: nothing is reused, nothing of the user's is touched.
        store = Path(root)
        _, outcomes = execute(state, Experiment("verify", tuple(specs)), tracking_uri=f"sqlite:///{store / 'mlflow.db'}", root=store)
        for claim, outcome in zip(claims, outcomes, strict=True):
            problems = differences(claim, json.loads(outcome.run.record.model_dump_json()), tolerance)
            different += any(p.startswith("differs") for p in problems)
            click.echo(f"{outcome.spec.label()}: {'; '.join(problems)}")
    click.echo(f"{len(claims) - different} of {len(claims)} runs as the report claims")
    return 1 if different else 0


def differences(claim: dict[str, Any], record: dict[str, Any], tolerance: float) -> list[str]:
    """What a new run has in common with a reported one, in words; those that begin with 'differs' count."""
    if claim["status"] != record["status"]:
        return [f"differs: was {claim['status']}, is {record['status']}"]
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
        if a != b and (a is None or b is None or abs(a - b) > tolerance * max(abs(a), abs(b))):
            found.append(f"differs: {name} was {a}, is {b}")
    before, after = ({a["name"]: a for a in r["artifacts"]} for r in (claim, record))
    if before.keys() != after.keys():
        found.append(f"differs: artifacts were {', '.join(sorted(before))}, are {', '.join(sorted(after))}")
        return found
    changed = sorted(n for n in before if before[n]["sha256"] != after[n]["sha256"])
    if not changed:
        return [*found, "same bits"]
    apart = [n for n in changed if not close(before[n].get("summary", {}), after[n].get("summary", {}), tolerance)]
    found += [f"differs: the numbers of {name!r} (mean, size) are not within {tolerance:g}" for name in apart]
    if len(changed) > len(apart):
        found.append(f"within tolerance, other bits in {', '.join(n for n in changed if n not in apart)}")
    return found


def close(old: dict[str, list[float]], new: dict[str, list[float]], tolerance: float) -> bool:
    """Whether each array's mean, root mean square and largest magnitude agree, relative to its root mean square."""
    if old.keys() != new.keys() or not old:
        return False
    return all(abs(a - b) <= tolerance * max(abs(a), abs(b), old[n][1]) for n in old for a, b in zip(old[n], new[n], strict=True))
