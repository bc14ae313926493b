"""The runner: keys, reuse, failures that stay alone, records, tracking."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest

from harness import Arrays, Heatmaps, Metric, NotApplicable, Param, Result, Technique, Use, hookimpl
from harness.errors import ConfigError, HarnessError, StorageError, TrackingError
from harness.experiment import Experiment, expand
from harness.plugins import Origin, _installed, discover
from harness.record import read_record
from harness.runner import Runner, Session, exit_code
from harness.tracking import tracker_for, tracking_uri

CALLS: list[str] = []


class Probe(Technique):
    """Does what its parameter says."""

    name = "probe"
    needs = frozenset({"images"})
    act: str = Param("work", description="what to do")

    def run(self, ctx):
        CALLS.append(self.act)
        if self.act == "fail":
            raise ZeroDivisionError("as asked")
        if self.act == "bad input":
            raise ConfigError("the input is bad")
        if self.act == "not applicable":
            raise NotApplicable("needs something else")
        if self.act == "change":
            ctx.model.module.train()
        if self.act == "nan":
            return Result([], [Metric("m", float("nan"), per_image=[1.0, float("inf")])])
        if self.act == "wrong":
            return 3
        if self.act == "unstorable":
            return Result([Heatmaps("map", ctx.images.amax(1), captions=["a"] * len(ctx.ids), caption=object())])
        if self.act == "notes":
            return Result(notes=[3])
        if self.act == "name":
            return Result([Heatmaps("../map", ctx.images.amax(1))])
        if self.act == "over":
            return Result([Heatmaps("map", ctx.images.amax(1).repeat(5, 1, 1))])
        if self.act == "unrepeatable":
            import warnings

            for _ in range(2):
                warnings.warn("pool_backward_cuda does not have a deterministic implementation, but you set", stacklevel=1)
        if self.act == "hungry" and ctx.max_batch > 3:
            ctx.max_batch = 3
        noise = ctx.randn_like(ctx.images)
        return Result([Heatmaps("map", noise.abs().amax(1))], [Metric("m", noise.mean(), per_image=noise.flatten(1).mean(1).tolist())])


class Base(Technique):
    """Something to build on."""

    name = "base"
    needs = frozenset({"dataset"})
    value: int = Param(1, description="a number")

    def run(self, ctx):
        CALLS.append(f"base {self.value}")
        if self.value < 0:
            raise ValueError("negative")
        return Result([Arrays("value", {"v": np.array([self.value])})])


class Above(Technique):
    """Builds on another."""

    name = "above"
    needs = frozenset({"dataset"})
    value: int = Param(1, description="a number")

    def uses(self):
        return (Use("base", {"value": self.value}),)

    def run(self, ctx):
        CALLS.append("above")
        return Result([], [Metric("m", ctx.results["base"]["value"].data["v"][0] * 2)])


class Demanding(Technique):
    """Builds on another and wants more than it."""

    name = "demanding"
    needs = frozenset({"dataset", "conv", "marks"})

    def uses(self):
        return (Use("base"),)

    def run(self, ctx):
        CALLS.append("demanding")
        return Result()


class Twice(Technique):
    """Builds on one technique twice."""

    name = "twice"
    needs = frozenset({"dataset"})
    named: bool = Param(True, description="whether the uses have names")

    def uses(self):
        return tuple(Use("base", {"value": v}, f"base {v}" if self.named else "") for v in (1, 2))

    def run(self, ctx):
        return Result([], [Metric("m", sum(10**i * r["value"].data["v"][0] for i, r in enumerate(ctx.results.values())))])


class OnPictures(Technique):
    """Looks at pictures and at what another made of the same pictures."""

    name = "on_pictures"
    needs = frozenset({"images"})

    def uses(self):
        return (Use("features"),)

    def run(self, ctx):
        return Result(
            [], [Metric("pictures", len(ctx.images)), Metric("features", len(ctx.results["features"]["features"].data["features"]))]
        )


class Judge(Technique):
    """Builds on two maps, if they are there."""

    name = "judge"
    needs = frozenset({"images"})
    act: str = Param("work", description="what the first of them does")

    def uses(self):
        return (Use("probe", {"act": self.act}, "first", optional=True), Use("probe", {}, "second", optional=True))

    def run(self, ctx):
        CALLS.append("judge")
        again = ctx.again("second", rows=[1])["map"].data
        assert np.array_equal(again[0], ctx.results["second"]["map"].data[1])  # the same seed, the same picture
        return Result([], [Metric("found", len(ctx.results))], [f"{k}: {v}" for k, v in ctx.missing.items()])


class Higher(Technique):
    """Builds on what builds on two maps."""

    name = "higher"
    needs = frozenset({"images"})
    act: str = Param("work", description="what the first of them does")

    def uses(self):
        return (Use("judge", {"act": self.act}),)

    def run(self, ctx):
        CALLS.append("higher")
        return Result([], [Metric("m", 1)])


class EachOne(Technique):
    """Makes something for each picture, which it opens itself."""

    name = "each_one"
    needs = frozenset({"dataset"})
    per_picture = True

    def run(self, ctx):
        return Result([], [Metric("n", len(ctx.dataset))])


class Labels(Technique):
    """Needs labels."""

    name = "labels"
    needs = frozenset({"dataset", "labels"})

    def run(self, ctx):
        return Result([], [Metric("n", len(ctx.labels))])


class Maps(Technique):
    """Needs convolutions."""

    name = "maps"
    needs = frozenset({"conv"})

    def run(self, ctx):
        return Result([], [Metric("n", 1)])


@pytest.fixture(scope="module")
def mine():
    made = types.ModuleType("made")
    made.harness_techniques = hookimpl(lambda: [Probe, Base, Above, Demanding, Twice, OnPictures, Labels, Maps, Judge, Higher, EachOne])
    return discover([*_installed(), (Origin("mine", "0.3", "mine"), lambda: made)])


@pytest.fixture
def go(mine, registry, own_state):
    def run(*techniques, name="test", cache=True, models=("digits_cnn",), datasets=("digits",), uri="", limit=3, **common):
        CALLS.clear()
        runs = expand(mine, models, datasets, [(t, p) for t, p in techniques], limit=limit, **common)
        session = Session(Experiment(name, runs, name, "cmd"), own_state, uri)
        return session, Runner(registry, mine, session, cache).run(session.experiment)

    return run


def probe(act="work"):
    return ("probe", {"act": act})


def test_a_finished_run_is_reused(go):
    _, first = go(probe())
    _, second = go(probe(), name="another experiment")
    assert (first[0].how, second[0].how) == ("computed", "reused")
    assert CALLS == []
    assert second[0].run.record == first[0].run.record
    _, third = go(probe(), cache=False)
    assert third[0].how == "computed"
    assert np.array_equal(third[0].run.artifact("map").data, first[0].run.artifact("map").data)


def test_the_key_follows_everything_the_result_depends_on(go, mine, registry, own_state, monkeypatch):
    def key(technique="probe", params=None, model="digits_cnn", dataset="digits", **common):
        runs = expand(mine, [model], [dataset], [(technique, params or {})], **{"limit": 3, **common})
        return Runner(registry, mine, Session(Experiment("k", runs), own_state)).plan(runs[0]).key

    base = key()
    assert key() == base
    assert key(max_batch=7) == base
    assert key(params={"act": "work"}) == base  # a default that is spelt out
    others = [
        key(params={"act": "x"}), key(model="digits_resnet"), key(model="digits_cnn@random"), key(model="digits_cnn@random:1"), key(dataset="digits_test"),
        key(limit=4), key(limit=None, select=[0, 1, 2]), key(seeds=[1]), key(precision="bfloat16"),
    ]  # fmt: skip
    monkeypatch.setattr(Probe, "version", 2)
    others.append(key())
    assert len({base, *others}) == len(others) + 1


def test_one_failure_stops_nothing_else(go):
    _, outcomes = go(probe("fail"), probe(), probe("not applicable"))
    assert [o.run.record.status for o in outcomes] == ["failed", "finished", "not_applicable"]
    error = outcomes[0].run.record.error
    assert error.message == "ZeroDivisionError: as asked"
    assert "in run" in error.traceback
    assert exit_code(outcomes) == 1
    assert exit_code(outcomes[1:]) == 0
    _, again = go(probe("fail"), probe())
    assert [o.how for o in again] == ["computed", "reused"]  # a failure is tried again


def test_bad_input_found_late_is_exit_code_2(go):
    _, outcomes = go(probe("bad input"), probe("fail"))
    assert outcomes[0].run.record.error.message == "the input is bad"
    assert exit_code(outcomes) == 2


def test_a_changed_model_is_a_failure_and_is_loaded_anew(go):
    _, outcomes = go(probe("change"), probe())
    assert "left the model changed: modules or training flags" in outcomes[0].run.record.error.message
    assert outcomes[1].run.record.status == "finished"


def test_what_is_not_a_result_is_a_failure(go):
    assert "must return a Result" in go(probe("wrong"))[1][0].run.record.error.message


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("unstorable", "cannot be stored: TypeError"),
        ("notes", "notes are sentences"),
        ("name", "artifact name '../map' is not letters"),
        ("over", "lie over picture 14 of 3"),
    ],
)
def test_a_result_that_cannot_be_kept_is_the_techniques_own_failure(go, act, message):
    _, outcomes = go(probe(act), probe())
    assert [o.run.record.status for o in outcomes] == ["failed", "finished"]
    assert message in outcomes[0].run.record.error.message


def test_two_uses_of_one_technique_have_names(go):
    assert go(("twice", {}))[1][0].run.record.metric("m").value == 21
    with pytest.raises(HarnessError, match="give each Use a `name`"):
        go(("twice", {"named": False}))


def test_what_a_run_builds_on_sees_the_same_pictures(go):
    for limit, count in ((None, 20), (5, 5)):
        record = go(("on_pictures", {}), limit=limit)[1][0].run.record
        assert [m.value for m in record.metrics] == [count, count]


def test_models_are_loaded_once_each_and_answers_stand_in_the_order_asked_for(go, monkeypatch):
    from harness import models

    loads = []
    real = models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, *rest: loads.append(name) or real(name, *rest))
    _, outcomes = go(probe(), ("base", {}), models=["digits_cnn", "digits_resnet"])
    assert loads == ["digits_cnn", "digits_resnet"]
    assert [(o.spec.technique, o.spec.model) for o in outcomes] == [
        ("probe", "digits_cnn"), ("probe", "digits_resnet"), ("base", "digits_cnn"), ("base", "digits_resnet"),
    ]  # fmt: skip


def test_one_model_without_weights_fails_alone(go, monkeypatch):
    from harness import weights

    monkeypatch.setattr(weights.TorchvisionWeights, "fetch", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    _, outcomes = go(probe(), models=["vgg16", "digits_cnn"])
    assert [o.run.record.status for o in outcomes] == ["failed", "finished"]
    assert "weights of 'vgg16' are not here" in outcomes[0].run.record.error.message
    assert exit_code(outcomes) == 2
    with pytest.raises(ConfigError, match="weights of 'vgg16' are not here"):
        go(probe(), models=["vgg16"])


def test_other_code_is_another_key(mine, own_state, tmp_path):
    """The same registry, but the user's network, conversion or target was edited."""
    from harness.registry import load_registry

    (tmp_path / "r.yaml").write_text("models:\n  mine: {builder: 'net.py:Net', input: {channels: 1, size: 8}}\n")
    keys = []
    for text in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "net.py").write_text(text)
        runs = expand(mine, ["mine"], ["digits"], [("probe", {})], limit=3)
        keys.append(Runner(load_registry([tmp_path / "r.yaml"]), mine, Session(Experiment("k", runs), own_state)).plan(runs[0]).key)
    assert keys[0] == keys[2] != keys[1]


def test_more_class_names_than_scores_is_told(go, tmp_path, mine, own_state):
    from harness.registry import load_registry

    (tmp_path / "r.yaml").write_text(
        "models:\n  mine: {builder: 'harness.nets:DigitsLinear', args: {classes: 9}, weights: 'random:0', classes: digits, input: {channels: 1, size: 8}}\n"
    )
    runs = expand(mine, ["mine"], ["digits"], [("predictions", {})], limit=3)
    outcome = Runner(load_registry([tmp_path / "r.yaml"]), mine, Session(Experiment("k", runs), own_state)).run(Experiment("k", runs))[0]
    assert "has 10 class names for 9 scores" in outcome.run.record.error.message


def test_folders_named_by_index_label_a_model_without_names(tmp_path, registry):
    from PIL import Image

    from harness.context import labels_of
    from harness.datasets import load_dataset
    from harness.models import LoadedModel
    from harness.nets import DigitsLinear

    for c in (3, 0):
        (tmp_path / "set" / str(c)).mkdir(parents=True)
        Image.new("L", (8, 8), c).save(tmp_path / "set" / str(c) / "a.png")
    model = LoadedModel(DigitsLinear(), registry.model("digits_linear").input)
    assert labels_of(load_dataset(str(tmp_path / "set"), registry), model).tolist() == [0, 3]


def test_operations_that_are_not_repeatable_are_noted_once(go):
    notes = go(probe("unrepeatable"))[1][0].run.record.notes
    assert notes == ["not repeatable bit for bit: pool_backward_cuda has no deterministic form on this device"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_runs_to_the_end(go, precision):
    everything = [
        ("saliency", {}),
        ("occlusion", {}),
        ("predictions", {}),
        ("nearest_neighbors", {"k": 1}),
        ("class_visualization", {"steps": 3}),
    ]
    _, outcomes = go(*everything, precision=precision)
    assert [o.run.record.error for o in outcomes] == [None] * len(everything)
    assert {o.run.record.device["precision"] for o in outcomes} == {precision}


def test_numbers_that_are_not_finite_are_kept_as_such(go):
    metric = go(probe("nan"))[1][0].run.record.metrics[0]
    assert (metric.value, metric.per_image) == (None, [1.0, None])


def test_the_batch_that_was_used_is_recorded(go):
    assert go(probe("hungry"))[1][0].run.record.batch == 3
    assert go(probe())[1][0].run.record.batch == 32


def test_what_a_run_builds_on_is_made_once_and_is_part_of_its_key(go):
    _, outcomes = go(("above", {}), ("above", {"value": 2}), ("base", {}))
    assert CALLS == ["base 1", "above", "base 2", "above"]
    assert [o.run.record.metric("m").value for o in outcomes[:2]] == [2, 4]
    assert outcomes[0].run.record.uses == [outcomes[2].run.record.key]


def test_a_failure_below_is_told_above(go):
    _, outcomes = go(("above", {"value": -1}))
    assert outcomes[0].run.record.status == "failed"
    assert "base, which it builds on, has no result: ValueError: negative" in outcomes[0].run.record.error.message


@pytest.mark.parametrize(
    ("technique", "model", "dataset", "message"),
    [
        ("labels", "digits_cnn", "cifar10_samples", "labels are classes of this model"),
        ("maps", "digits_linear", "digits", "needs a model with convolutions"),
    ],
)
def test_what_does_not_apply_says_so(go, technique, model, dataset, message):
    _, outcomes = go((technique, {}), models=[model], datasets=[dataset])
    assert outcomes[0].run.record.status == "not_applicable"
    assert message in outcomes[0].run.record.error.message
    assert exit_code(outcomes) == 0


@pytest.mark.parametrize(
    ("model", "dataset", "message"),
    [
        ("digits_linear", "snow_train", "needs a model with convolutions"),
        ("digits_cnn", "digits", "needs pictures in which something is marked"),
        ("digits_cnn", "snow_train", ""),
    ],
)
def test_nothing_is_computed_for_what_does_not_apply(go, model, dataset, message):
    _, outcomes = go(("demanding", {}), models=[model], datasets=[dataset])
    record = outcomes[0].run.record
    if message:
        assert CALLS == [] and record.status == "not_applicable"
        assert message in record.error.message
    else:
        assert CALLS == ["base 1", "demanding"] and record.status == "finished"


def test_the_record_tells_everything(go):
    record = go(probe(), seeds=[7])[1][0].run.record
    assert record.technique.distribution == "mine"
    assert record.technique.distribution_version == "0.3"
    assert record.seed == 7
    assert record.model.weights == "9ff49e604fd15953a20741d0520d021d5f94ff20a1db836c1f86da42e6a1c901"
    assert len(record.dataset.fingerprint) == 64
    assert record.dataset.selected == ["digit-0000", "digit-0599", "digit-1198"]
    assert record.device["deterministic"] is True
    assert record.versions["torch"]
    assert record.peak_memory_bytes > 1e6
    assert record.started.endswith("+00:00")


def test_pictures_a_technique_saw_are_kept(go):
    run = go(probe())[1][0].run
    assert run.artifact("inputs").data.shape == (3, 1, 8, 8)


def test_without_a_limit_a_technique_on_pictures_gets_twenty(go):
    assert len(go(probe(), limit=None)[1][0].run.record.dataset.selected) == 20


def test_runs_are_stored_in_mlflow_and_leave_the_spool(go, own_state):
    session, outcomes = go(probe(), probe("fail"))
    assert list(session.spool) == []
    tracker = tracker_for(tracking_uri("", own_state), own_state)
    manifest, runs = tracker.load("test")
    assert [r.record.run_id for r in runs] == [o.run.record.run_id for o in outcomes]
    assert manifest["command"] == "cmd"
    stored = tracker.client.get_run(manifest["runs"][0]["mlflow_run"])
    assert stored.info.status == "FINISHED"
    assert stored.data.params["act"] == "work"
    assert stored.data.metrics["m"] == pytest.approx(outcomes[0].run.record.metrics[0].value)
    assert stored.data.tags["harness.key"] == outcomes[0].run.record.key
    parent = tracker.client.get_run(stored.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["harness.kind"] == "experiment"
    assert parent.info.status == "FAILED"
    assert tracker.client.get_run(manifest["runs"][1]["mlflow_run"]).info.status == "FAILED"


def test_an_altered_artifact_is_noticed(go):
    run = go(probe())[1][0].run
    (run.folder / "map.npz").write_bytes(b"x")
    with pytest.raises(StorageError, match="altered"):
        run.artifact("map")
    (run.folder / "record.json").write_text("{}")
    with pytest.raises(StorageError, match="not a record"):
        read_record(run.folder)


def test_an_altered_run_is_computed_again(go):
    run = go(probe())[1][0].run
    (run.folder / "map.npz").write_bytes(b"x")
    session, outcomes = go(probe())
    assert outcomes[0].how == "computed" and outcomes[0].run.damage() == ""
    assert any("map.npz" in w and "computed again" in w for w in session.warnings)
    assert go(probe())[1][0].how == "reused"


def test_a_run_folder_that_no_database_address_can_hold(monkeypatch, tmp_path):
    from harness.paths import runs_folder

    monkeypatch.setenv("HARNESS_RUNS", str(tmp_path / "a%20b"))
    with pytest.raises(ConfigError, match="has a '%'"):
        runs_folder()


def test_other_code_of_its_package_is_another_key(mine, own_state, tmp_path, monkeypatch):
    from harness.registry import load_registry

    package = tmp_path / "their_package_of_nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text("from .blocks import SCALE")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "r.yaml").write_text("models:\n  mine: {builder: 'their_package_of_nets.net:Net', input: {channels: 1, size: 8}}\n")
    keys = []
    for text in ("SCALE = 1", "SCALE = -1", "SCALE = 1"):
        (package / "blocks.py").write_text(text)
        runs = expand(mine, ["mine"], ["digits"], [("probe", {})], limit=3)
        keys.append(Runner(load_registry([tmp_path / "r.yaml"]), mine, Session(Experiment("k", runs), own_state)).plan(runs[0]).key)
    assert keys[0] == keys[2] != keys[1]


def test_names_and_classes_are_in_the_key(mine, own_state, tmp_path):
    """Labels are told by name, and a record must be about what it is reused for."""
    from harness.registry import load_registry

    text = (
        "datasets:\n  NAME: {source: 'package:foolbox/data', files: ['mnist_*.png'], classes: [CLASSES]}\n"
        "models:\n  MODEL: {builder: 'harness.nets:DigitsCNN', input: {channels: 1, size: 8}}\n"
    )
    right = [str(n) for n in range(10)]
    keys = []
    for model, name, classes in (("m", "a", right), ("m", "a", right), ("m", "b", right), ("m", "a", right[::-1]), ("n", "a", right)):
        spelt = text.replace("CLASSES", ", ".join(f"'{c}'" for c in classes)).replace("NAME", name).replace("MODEL", model)
        (tmp_path / "r.yaml").write_text(spelt)
        runs = expand(mine, [model], [name], [("probe", {})], limit=3)
        keys.append(Runner(load_registry([tmp_path / "r.yaml"]), mine, Session(Experiment("k", runs), own_state)).plan(runs[0]).key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_an_unreachable_server_costs_one_warning_and_nothing_else(go, own_state):
    import time

    begun = time.monotonic()
    session, outcomes = go(probe(), probe("fail"), uri="http://127.0.0.1:9")
    assert time.monotonic() - begun < 10
    assert [w for w in session.warnings if "does not answer" in w] == session.warnings
    assert len(session.warnings) == 1
    assert outcomes[0].run.record.status == "finished"
    assert len(list(session.spool)) == 2
    _, again = go(probe(), uri="http://127.0.0.1:9")
    assert again[0].how == "reused"  # from the spool
    # the server is back: everything goes there, and what is handed on to the report is where the run now stands
    session, third = go(probe())
    assert third[0].how == "reused"
    assert list(session.spool) == []
    assert third[0].run.damage() == ""
    assert {r.record.status for r in tracker_for(tracking_uri("", own_state), own_state).load("test")[1]} >= {"finished"}


def test_an_experiment_made_without_its_server_is_whole_after_sync(go, own_state):
    from harness.tracking import sync

    session, outcomes = go(probe(), probe("fail"), uri="http://127.0.0.1:9")
    tracker = tracker_for(tracking_uri("", own_state), own_state)
    assert sync(tracker, session) == 2
    assert list((own_state / "spool").iterdir()) == []
    manifest, runs = tracker.load("test")
    assert [r.record.run_id for r in runs] == [o.run.record.run_id for o in outcomes]
    assert manifest["command"] == "cmd"
    stored = tracker.client.get_run(manifest["runs"][0]["mlflow_run"])
    assert tracker.client.get_run(stored.data.tags["mlflow.parentRunId"]).info.status == "FAILED"


def test_runs_without_their_experiment_can_be_reported(go, own_state):
    """Killed while the server was away: the runs are there, the list of them is not."""
    from harness.tracking import sync

    session, outcomes = go(probe(), uri="http://127.0.0.1:9")
    for path in (own_state / "spool").glob("*/*.json"):
        path.unlink()
    tracker = tracker_for(tracking_uri("", own_state), own_state)
    sync(tracker, session)
    manifest, runs = tracker.load("test")
    assert manifest["interrupted"]
    assert [r.record.run_id for r in runs] == [outcomes[0].run.record.run_id]


def test_a_list_of_runs_that_waits_alone_is_sent(go, own_state):
    """Its runs got through, and then the server went away."""
    from harness.experiment import Experiment
    from harness.runner import Session
    from harness.tracking import sync

    session, _ = go(probe(), uri="http://127.0.0.1:9")
    (path,) = (own_state / "spool").glob("*/*.json")
    text = path.read_bytes()
    tracker = tracker_for(tracking_uri("", own_state), own_state)
    assert sync(tracker, session) == 1
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text)
    later = Session(Experiment("runs", ()), own_state)
    assert later.spool.waiting()
    assert sync(tracker, later) == 0
    assert not later.spool.waiting()
    assert not path.exists()


def test_the_spool_of_a_process_that_lives_is_left_alone(go, own_state):
    """A folder whose owner holds its lock is not read; once the owner is gone it is taken over."""
    import fcntl
    import shutil

    session, outcomes = go(probe(), uri="http://127.0.0.1:9")
    theirs = own_state / "spool" / "theirs"
    (theirs / ".writing-x").mkdir(parents=True)
    shutil.copytree(outcomes[0].run.folder, theirs / "run")
    with (own_state / "spool" / "theirs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert len(list(session.spool)) == 1
    assert len(list(session.spool)) == 2
    assert not (theirs / ".writing-x").exists()


def test_a_record_that_cannot_be_read_is_computed_again(go, own_state):
    session, outcomes = go(probe(), uri="http://127.0.0.1:9")
    (outcomes[0].run.folder / "record.json").write_text("{}")
    session, again = go(probe(), uri="http://127.0.0.1:9")
    assert again[0].how == "computed"
    assert any("not a record" in w for w in session.warnings)
    _, stored = go(probe("other"))
    (stored[0].run.folder / "record.json").write_text("{}")
    session, again = go(probe("other"))
    assert again[0].how == "computed"
    assert any("it is computed again" in w for w in session.warnings)


def test_a_plain_folder_is_no_tracking_store(go):
    with pytest.raises(ConfigError, match="sqlite:///PATH"):
        go(probe(), uri="/tmp/x")
    assert CALLS == []
    with pytest.raises(ConfigError, match="sqlite:///PATH"):
        tracker_for("file:///tmp/x", Path("/tmp/x"))
    with pytest.raises(TrackingError, match="does not answer"):
        tracker_for("http://127.0.0.1:9/x", Path("/tmp/x"))


def test_a_full_disk_leaves_no_half_run(go, monkeypatch, own_state):
    import errno

    from harness import artifacts

    def full(self, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts.Artifact, "save", full)
    with pytest.raises(StorageError, match=r"cannot be written \(No space left on device\)"):
        go(probe())
    assert list((own_state / "spool").iterdir()) == []


def test_unknown_names_stop_before_anything_runs(go):
    for change, message in [({"models": ["digits_cn"]}, "did you mean 'digits_cnn'"), ({"datasets": ["digitz"]}, "did you mean 'digits'")]:
        with pytest.raises(ConfigError, match=message):
            go(probe(), **change)
    assert CALLS == []


def test_an_experiment_that_does_not_exist(own_state, go):
    go(probe())
    with pytest.raises(ConfigError, match="no experiment 'tset'; did you mean 'test'"):
        tracker_for(tracking_uri("", own_state), own_state).load("tset")


def test_tracking_costs_little(go):
    """Twenty runs: what is spent besides the runs themselves."""
    import time

    begun = time.monotonic()
    _, outcomes = go(*[("probe", {"act": f"work {i}"}) for i in range(20)])
    spent = time.monotonic() - begun - sum(o.run.record.seconds for o in outcomes)
    assert spent / 20 < 0.5  # `make bench` measures it; this only guards against a blunder


def test_an_optional_use_may_be_not_applicable(go):
    _, outcomes = go(("judge", {"act": "not applicable"}))
    record = outcomes[0].run.record
    assert record.status == "finished"
    assert record.metric("found").value == 1
    assert record.notes == ["first: needs something else"]
    go(("judge", {"act": "not applicable"}))
    assert CALLS == []  # reused


def test_what_was_made_without_a_failed_use_is_not_taken_for_the_whole(go):
    _, outcomes = go(("judge", {"act": "fail"}))
    assert outcomes[0].run.record.status == "finished"
    assert outcomes[0].run.record.notes == ["first: ZeroDivisionError: as asked"]
    _, outcomes = go(("judge", {"act": "fail"}))
    assert CALLS[0] == "fail"  # tried again
    assert outcomes[0].run.record.metric("found").value == 1


def test_nor_is_what_was_made_of_that(go):
    for _ in range(2):
        go(("higher", {"act": "fail"}))
        assert CALLS[0] == "fail" and CALLS[-1] == "higher"


def test_what_waits_for_the_store_is_no_reason_to_reuse_it(go):
    away = "http://127.0.0.1:9"
    go(probe(), probe("fail"), uri=away)
    _, outcomes = go(probe(), probe("fail"))
    assert [o.how for o in outcomes] == ["reused", "computed"]
    assert CALLS == ["fail"]  # what failed is tried again
    go(probe(), uri=away)
    _, outcomes = go(probe(), cache=False)
    assert CALLS == ["work"]


def test_what_makes_something_for_each_picture_takes_twenty(go):
    _, outcomes = go(("each_one", {}), ("base", {}), limit=None)
    assert outcomes[0].run.record.metric("n").value == 20
    assert len(outcomes[0].run.record.dataset.selected) == 20
    assert outcomes[1].run.record.dataset.pictures > 20


def test_an_experiment_gone_on_with_is_the_newest(go, own_state, monkeypatch):
    import time

    import harness.tracking as tracking

    tracker = tracker_for(tracking_uri("", own_state), own_state)
    go(probe(), name="first")
    with monkeypatch.context() as patched:  # interrupted: its list of runs is never entered
        patched.setattr(tracking.Tracker, "enter", lambda *_: None)
        go(probe("over"), name="runs", cache=False)
    time.sleep(0.05)
    go(probe("hungry"), name="runs")
    time.sleep(0.05)
    go(probe("over"), name="runs", cache=False)
    _, runs = tracker.load("runs")
    assert [r.record.params["act"] for r in runs] == ["over"]


@pytest.fixture
def interrupted(go, monkeypatch):
    """Runs an experiment that is stopped at `probe("hungry")`."""
    import harness.tracking as tracking

    finished = tracking.Tracker.log

    def stop(self, run, *arguments, **options):
        if options.get("fresh") and run.record.params.get("act") == "hungry":
            raise KeyboardInterrupt
        return finished(self, run, *arguments, **options)

    def run(*techniques, **options):
        with monkeypatch.context() as patched:
            patched.setattr(tracking.Tracker, "log", stop)
            with pytest.raises(KeyboardInterrupt):
                go(*techniques, probe("hungry"), probe("unrepeatable"), name="runs", **options)

    return run


def test_an_interrupted_experiment_shows_what_it_reused(go, own_state, interrupted):
    """And not what it did not come to, though that is in the store."""
    tracker = tracker_for(tracking_uri("", own_state), own_state)
    _, (reused, _) = go(probe(), probe("unrepeatable"), name="first")
    interrupted(("above", {}), probe())
    manifest, runs = tracker.load("runs")
    assert manifest["interrupted"]
    first, *others = (r.record.technique.name for r in runs)
    assert first == "probe" and sorted(others) == ["above", "base"]  # begun within the same second, in which there is no order
    assert runs[0].record.run_id == reused.run.record.run_id


def test_an_interrupted_experiment_shows_what_it_computed_anew(go, own_state, interrupted):
    tracker = tracker_for(tracking_uri("", own_state), own_state)
    _, (old,) = go(probe(), name="first")
    interrupted(probe())  # which reuses it
    interrupted(probe(), cache=False)
    (run,) = tracker.load("runs")[1]
    assert run.record.params["act"] == "work" and run.record.run_id != old.run.record.run_id


def test_a_failed_run_gives_way_to_one_that_is_reused(go, own_state, interrupted, monkeypatch):
    tracker = tracker_for(tracking_uri("", own_state), own_state)
    with monkeypatch.context() as patched:
        patched.setattr(Probe, "run", lambda self, ctx: 1 / 0)
        interrupted(probe())
    assert [r.record.status for r in tracker.load("runs")[1]] == ["failed"]
    _, (good,) = go(probe(), name="another")
    interrupted(probe())
    assert [r.record.run_id for r in tracker.load("runs")[1]] == [good.run.record.run_id]


def test_a_run_that_fails_after_it_was_reused_is_shown_as_failed(go, own_state, interrupted, monkeypatch):
    import time

    tracker = tracker_for(tracking_uri("", own_state), own_state)
    go(probe(), name="first")
    interrupted(probe())
    time.sleep(1.1)  # records know seconds
    with monkeypatch.context() as patched:
        patched.setattr(Probe, "run", lambda self, ctx: 1 / 0)
        interrupted(probe(), cache=False)
    assert [r.record.status for r in tracker.load("runs")[1]] == ["failed"]


def test_a_reused_run_whose_files_are_gone_costs_only_itself(go, own_state, interrupted):
    tracker = tracker_for(tracking_uri("", own_state), own_state)
    _, (lost, kept) = go(probe(), probe("notes2"), name="first")
    interrupted(probe(), probe("notes2"))
    (lost.run.folder / "record.json").write_text("{")
    assert [r.record.run_id for r in tracker.load("runs")[1]] == [kept.run.record.run_id]


def test_all_parameters_of_a_run_are_tracked(go, own_state, monkeypatch):
    import harness.tracking as tracking

    monkeypatch.setattr(tracking, "_PARAMS", 2)  # more than go at once
    _, (outcome,) = go(("above", {"value": 7}))
    tracker = tracker_for(tracking_uri("", own_state), own_state)
    (run,) = tracker.client.search_runs([tracker.experiment_id("test")], f"tags.`harness.run_id` = '{outcome.run.record.run_id}'")
    assert run.data.params == {"value": "7", "technique": "above", "model": "digits_cnn", "seed": "0", "dataset": "digits"}


def test_a_store_that_was_moved_says_so(go, own_state, tmp_path):
    import shutil

    go(probe())
    moved = own_state.parent / "moved"
    shutil.move(own_state, moved)
    with pytest.raises(ConfigError, match="the run folder was moved"):
        tracker_for(tracking_uri("", moved), moved).load("test")


def test_a_folder_of_the_spool_may_go_while_it_is_looked_at(go, own_state, monkeypatch):
    import harness.record as module

    session, _ = go(probe(), uri="http://127.0.0.1:9")
    gone = own_state / "spool" / "gone"
    gone.mkdir()
    lock = module._lock

    def late(folder):
        found = lock(folder)
        if folder == gone:
            folder.rmdir()
        return found

    monkeypatch.setattr(module, "_lock", late)
    assert len(list(session.spool)) == 1
    assert not gone.with_suffix(".lock").exists()


def test_the_key_follows_further_networks(registry, plugins, own_state):
    """Another judge, another generator, or the same with other weights: another key."""

    def key(registry, **params):
        runs = expand(plugins, ["digits_cnn"], ["digits"], [("deep_generator", params)], limit=3)
        return Runner(registry, plugins, Session(Experiment("k", runs), own_state)).plan(runs[0]).key

    own = key(registry)
    assert own == key(registry)
    other = registry.generator("digits_cnn_code").model_copy(update={"weights": "random:1", "sha256": None})
    other._where, other._folder = "test", registry.generator("digits_cnn_code").folder
    changed = type(registry)(**{**vars(registry), "generators": {"digits_cnn_code": other}})
    keys = [own, key(changed), key(registry, judge="digits_resnet"), key(registry, judge="digits_linear"), key(registry, generator="prior")]
    assert len(set(keys)) == 5
