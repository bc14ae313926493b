from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from .execute import execute, parse_list, parse_params, run_options
from .main import State


@click.command("run")
@click.argument("experiment", required=False, type=click.Path(path_type=Path))
@click.option("-m", "--model", "models", multiple=True, help="Model, or MODEL@random[:SEED]; may be repeated.")
@click.option("-d", "--dataset", "datasets", multiple=True, help="Dataset, or a folder's path; may be repeated.")
@click.option("-t", "--technique", "techniques", multiple=True, help="Technique; may be repeated.")
@click.option(
    "-p", "--param", "params", multiple=True, metavar="NAME=VALUE", help="Parameter; with several techniques TECHNIQUE.NAME=VALUE."
)
@run_options
@click.pass_obj
def command(
    state: State, experiment: Path | None, models: tuple[str, ...], datasets: tuple[str, ...], techniques: tuple[str, ...],
    params: tuple[str, ...], seed: int, limit: int | None, select: str | None, device: str, precision: str, max_batch: int,
    tracking_uri: str, no_cache: bool,
) -> int:  # fmt: skip
    """Run an experiment file, or techniques given by -m, -d and -t.

    \b
    harness run experiment.yaml
    harness run -m squeezenet1_1 -d imagenet_samples -t saliency -p values=signed --limit 4
    """
    from ..errors import ConfigError
    from ..experiment import Experiment, expand, load_experiment
    from ..runner import exit_code

    plugins = state.plugins()
    if experiment is not None:
        if models or datasets or techniques or params:
            raise ConfigError("give an experiment file or -m, -d, -t and -p, not both")
        given = click.get_current_context().get_parameter_source
        override = {
            name: value
            for name, value in {
                "seed": seed,
                "limit": limit,
                "select": parse_list(select, limit),
                "device": device,
                "precision": precision,
                "max_batch": max_batch,
            }.items()
            if (source := given(name)) is not None and source.name == "COMMANDLINE"
        }
        plan = replace(load_experiment(experiment, plugins, **override), command=state.command())
    else:
        if not models or not techniques:
            raise ConfigError("give an experiment file, or at least -m MODEL and -t TECHNIQUE")
        wanted = split_params(techniques, parse_params(params))
        runs = expand(
            plugins, models, datasets, list(wanted.items()), [seed],
            limit=limit, select=parse_list(select, limit), device=device, precision=precision, max_batch=max_batch,
        )  # fmt: skip
        plan = Experiment("runs", runs, "Runs", state.command())
    session, outcomes = execute(state, plan, tracking_uri=tracking_uri, use_cache=not no_cache)
    done = sum(o.run.record.status == "finished" for o in outcomes)
    click.echo(
        f"{done} of {len(outcomes)} runs finished; see `harness report {plan.name} -o DIR`"
        if not session.offline
        else f"{done} of {len(outcomes)} runs finished; results are in {session.spool.root}"
    )
    return exit_code(outcomes)


def split_params(techniques: tuple[str, ...], params: dict[str, object]) -> dict[str, dict[str, object]]:
    """Parameters by technique: 'name' for the only one, 'technique.name' for one of several."""
    from ..errors import ConfigError, unknown

    wanted: dict[str, dict[str, object]] = {name: {} for name in techniques}
    for key, value in params.items():
        technique, mark, name = key.partition(".")
        if not mark:
            if len(wanted) > 1:
                raise ConfigError(f"-p {key}: several techniques run; write TECHNIQUE.{key}=VALUE")
            technique, name = next(iter(wanted)), key
        if technique not in wanted:
            raise unknown("technique among those that run", technique, wanted)
        wanted[technique][name] = value
    return wanted
