"""The command line as a user meets it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.cli.main import COMMANDS, invoke

FAST = ["-d", "digits_test", "--limit", "12", "--profile", "quick", "-p", "class_visualization.steps=5"]


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words, code=0):
        found = invoke([str(w) for w in words])
        out, err = capsys.readouterr()
        assert found == code, out + err
        assert "Traceback" not in err
        return out, err

    return run


def python(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, **options)


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from harness.cli.main import invoke; invoke(['--help']); print([m for m in ('torch', 'mlflow', 'matplotlib', 'weasyprint', 'numpy', 'pydantic') if m in sys.modules])"
    assert python("-c", code).stdout.strip().endswith("[]")
    best = min(_seconds("-m", "harness", "--help") for _ in range(3))
    assert best < 0.5


def _seconds(*words):
    begun = time.monotonic()
    assert python(*words).returncode == 0
    return time.monotonic() - begun


def test_a_cached_run_answers_without_torch(tmp_path):
    words = ["run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "--limit", "3"]
    assert invoke(words) == 0
    code = f"import sys; from harness.cli.main import invoke; assert invoke({words}) == 0; print('torch' in sys.modules)"
    done = python("-c", code)
    assert "reused" in done.stderr
    assert done.stdout.strip().endswith("False")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli, command):
    assert "Usage: harness" in cli(command, "--help")[0]


def test_listings(cli):
    for command, name in [("techniques", "saliency"), ("models", "squeezenet1_1"), ("datasets", "imagenet_samples")]:
        assert name in cli(command)[0]
        assert name in [item["name"] for item in json.loads(cli(command, "--json")[0])]


def test_show(cli):
    out, _ = cli("show", "squeezenet1_1")
    assert "features.3.expand3x3" in out
    assert "256 x 13 x 13" in out
    assert json.loads(cli("show", "digits_cnn", "--json")[0])[0]["receptive_field"] == 3
    assert "window = 0.143" in cli("show", "occlusion")[0]
    assert "window" in json.loads(cli("show", "occlusion", "--json")[0])["properties"]
    assert "pictures: 1797" in cli("show", "digits")[0]
    assert "did you mean 'saliency'" in cli("show", "salency", code=2)[1]


def test_doctor(cli):
    out, _ = cli("doctor")
    assert "PROBLEM" not in out
    assert "absent   weights of vgg16: on a machine with a network download" in out


def test_audit_report_and_verify(cli, tmp_path):
    out, err = cli("audit", "digits_cnn", *FAST, "-o", "a")
    assert out.split() == ["a/report.html", "a/report.pdf", "a/report.json"]
    assert "6/6" in err
    # the same runs, from the tracking store alone: the same bytes
    cli("report", "audit-digits_cnn", "-o", "b")
    for name in ("report.html", "report.pdf", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "reused" in cli("audit", "digits_cnn", *FAST, "-o", "c", "--format", "json")[1]
    assert not (tmp_path / "c" / "report.html").exists()
    out, _ = cli("verify", "a")
    assert "6 of 6 runs as the report claims" in out
    assert out.count("same bits") == 6
    claims = json.loads((tmp_path / "a" / "report.json").read_text())
    claims["runs"][0]["metrics"][0]["value"] += 0.5
    (tmp_path / "a" / "report.json").write_text(json.dumps(claims))
    assert "differs: confidence was" in cli("verify", "a", code=1)[0]
    del claims["runs"][-1]["status"]
    (tmp_path / "a" / "report.json").write_text(json.dumps(claims))
    assert "not a report of this harness (KeyError)" in cli("verify", "a", code=2)[1]


def test_verify_notices_other_data_weights_and_numbers():
    from harness.cli.verify import differences

    def run(**change):
        artifact = {"name": "f", "sha256": "1", "summary": {"features": [0.5, 2.0, 7.0]}}
        base = {
            "status": "finished",
            "key": "k",
            "metrics": [],
            "artifacts": [artifact],
            "model": {"weights": "w"},
            "dataset": {"fingerprint": "d"},
        }
        return {**base, **change}

    def other(**change):
        return {"artifacts": [{"name": "f", "sha256": "2", "summary": {"features": [0.5, 2.0, 7.0]}, **change}]}

    assert differences(run(), run(), 1e-4) == ["same bits"]
    assert differences(run(), run(**other()), 1e-4) == ["within tolerance, other bits in f"]
    assert differences(run(), run(**other(summary={"features": [0.50001, 2.0, 7.0]})), 1e-4) == ["within tolerance, other bits in f"]
    for change, word in [
        (other(summary={"features": [0.6, 2.0, 7.0]}), "differs: the numbers of 'f'"),
        (other(summary={}), "differs: the numbers of 'f'"),
        ({"key": "x", "model": {"weights": "v"}}, "differs: weights were w, are v"),
        ({"key": "x", "dataset": None}, "differs: data were d, are "),
        ({"artifacts": []}, "differs: artifacts were f, are "),
    ]:
        assert any(p.startswith(word) for p in differences(run(), run(**change), 1e-4)), change


def test_verify_reads_tables_failures_and_every_picture():
    from harness.cli.verify import check, differences

    def run(sha, rows, **change):
        artifact = {"name": "answers", "sha256": sha, "summary": {}}
        metric = {"name": "hits", "value": 0.5, "per_image": [0.0, 1.0]}
        base = {"status": "finished", "key": "k", "metrics": [metric], "artifacts": [artifact]}
        return {**base, "tables": {"answers": {"columns": ["name", "chance"], "rows": rows}}, **change}

    def told(new, old=None):
        old = old or run("1", [["cat", 0.7], ["dog", 1e-9]])
        return differences(old, new, 1e-4, new["tables"])

    # other bits of a table on another machine are no difference, other numbers and words are
    assert told(run("2", [["cat", 0.70001], ["dog", 1.1e-9]])) == ["within tolerance, other bits in answers"]
    for rows in ([["cat", 0.71], ["dog", 1e-9]], [["car", 0.7], ["dog", 1e-9]], [["cat", 0.7]], [["cat", None], ["dog", 1e-9]]):
        assert told(run("2", rows)) == ["differs: the table 'answers'"], rows
    # what is claimed is compared, not only its hash
    assert told(run("1", [["cat", 0.7], ["dog", 1e-9]]), run("1", [["cat", 0.9], ["dog", 1e-9]])) == ["differs: the table 'answers'"]
    other = run("1", [["cat", 0.7], ["dog", 1e-9]], metrics=[{"name": "hits", "value": 0.5, "per_image": [1.0, 0.0]}])
    assert told(other) == ["differs: the values of 'hits', picture by picture"]
    for value in (float("nan"), float("inf")):
        odd = run("1", [["cat", 0.7], ["dog", 1e-9]], metrics=[{"name": "hits", "value": value, "per_image": [0.0, 1.0]}])
        assert told(run("1", [["cat", 0.7], ["dog", 1e-9]]), odd)[0].startswith("differs: hits was")
    for wrong in ("0.5", True, [1]):
        with pytest.raises(ValueError, match="number"):
            check(run("1", [], metrics=[{"name": "hits", "value": wrong}]))
    # what hides other numbers, or cannot be compared, is no report
    for rows in ([[1, 2, 3]], [[1e200, 0.1]], [[10**400, 0.1]], [[[1], 0.1]]):
        with pytest.raises(ValueError, match="row|large"):
            check(run("1", rows))
    hidden = run(
        "1",
        [],
        artifacts=[{"name": "heat", "sha256": "1", "summary": {"data": [0.0, 1.0, 2.0]}}],
        tables={"heat": {"columns": [], "rows": []}},
    )
    made = {**hidden, "artifacts": [{"name": "heat", "sha256": "2", "summary": {"data": [0.5, 1.0, 2.0]}}]}
    assert differences(hidden, made, 1e-4, {}) == ["differs: the numbers of 'heat' (mean, size) are not within 0.0001"]
    # a failure is no result that could be the same
    failed = {"status": "failed", "key": "k", "metrics": [], "artifacts": [], "tables": {}, "error": {"message": "no memory"}}
    assert told(failed, failed) == ["failed as before: no memory"]
    assert told({**failed, "error": {"message": "broken"}}, failed) == ["failed: broken; before: no memory"]
    kept = {**failed, "status": "not_applicable", "error": {"message": "needs labels"}}
    assert told(kept, kept) == ["same bits"]
    assert told({**kept, "error": {"message": "needs maps"}}, kept) == ["differs: was not_applicable as 'needs labels', is as 'needs maps'"]


def test_a_report_of_nothing_is_not_verified(cli, tmp_path):
    (tmp_path / "report.json").write_text('{"runs": []}')
    assert "it reports no runs" in cli("verify", ".", code=2)[1]


def test_a_format_that_fails_costs_no_other(cli, tmp_path, monkeypatch):
    from harness.errors import StorageError
    from harness_reports import document

    words = ["run", "-m", "digits_linear", "-d", "digits_test", "--limit", "3", "-t", "predictions"]
    cli(*words)
    cli("report", "runs", "-o", "r")
    old = (tmp_path / "r" / "report.json").read_bytes()

    def fails(*_, **__):
        raise StorageError("the PDF needs Pango")

    monkeypatch.setattr(document.PdfReport, "render", fails)
    cli(*words, "-t", "saliency", "-p", "saliency.values=signed")
    out, err = cli("report", "runs", "-o", "r", code=2)
    assert out.split() == ["r/report.html", "r/report.json"] and "needs Pango" in err
    assert (tmp_path / "r" / "report.json").read_bytes() != old
    assert not (tmp_path / "r" / "report.pdf").exists()  # that of the runs before


def test_missing_weights_of_a_second_network_cost_one_run(cli, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "models:\n  absent: {builder: 'harness.nets:DigitsCNN', weights: 'file:none.safetensors', classes: digits, input: {channels: 1, size: 8}}\n"
    )
    words = ["-r", "r.yaml", "run", "-m", "digits_cnn", "-d", "digits_test", "--limit", "3", "-t", "transfer_matrix", "-t", "predictions"]
    out, err = cli(*words, "-p", "transfer_matrix.models=[absent]", code=2)
    assert "1 of 2 runs finished" in out
    assert "transfer_matrix on digits_cnn, digits_test: FAILED: weights of 'absent' are not here" in err
    alone = [w for w in words if w != "predictions"][:-1]
    assert "weights of 'absent' are not here" in cli(*alone, "-p", "models=[absent]", code=2)[1]


def test_the_command_line_chooses_pictures_in_place_of_the_file(cli, tmp_path):
    text = "name: some\nmodels: [digits_linear]\ndatasets: [digits_test]\ntechniques: [predictions]\n"
    (tmp_path / "limit.yaml").write_text(text + "limit: 6\n")
    (tmp_path / "select.yaml").write_text(text + "select: [0, 1, 2, 3]\n")
    for file, choice, count in (("limit", ["--select", "0,3"], 2), ("select", ["--limit", "3"], 3)):
        cli("run", f"{file}.yaml", *choice)
        cli("report", "some", "--format", "json", "-o", file)
        (run,) = json.loads((tmp_path / file / "report.json").read_text())["runs"]
        assert len(run["tables"]["answers"]["rows"]) == count
        assert (run["spec"]["limit"] is None) != (run["spec"]["select"] is None)
    (tmp_path / "both.yaml").write_text(text + "limit: 6\nselect: [0]\n")
    assert "limit and select both choose pictures" in cli("run", "both.yaml", code=2)[1]


def test_names_that_are_not_utf8_can_be_stored(cli, tmp_path):
    import os

    for name in (b"caf\xe9", b"tea"):
        os.makedirs(os.fsencode(tmp_path / "pics") + b"/" + name)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (12, 12), dtype=np.uint8)
            with open(os.fsencode(tmp_path / "pics") + b"/" + name + b"/%d\xe9.png" % i, "wb") as file:
                Image.fromarray(pixels).save(file, "png")
    cli("run", "-m", "digits_cnn", "-d", "./pics", "-t", "pca_map")
    with open(os.fsencode(tmp_path / "pics") + b"/tea/3\xe9.png", "wb") as file:
        file.write(b"no picture")
    _, err = cli("run", "-m", "digits_cnn", "-d", "./pics", "-t", "pca_map", code=2)
    assert "3\\xe9.png" in err or "3\\udce9.png" in err


def test_the_command_kept_has_no_store_in_it():
    """An address may hold a password, and a report goes to others."""
    from harness.cli.main import State

    words = [
        "--debug",
        "run",
        "e.yaml",
        "--tracking-uri",
        "http://me:secret@host",
        "--no-cache",
        "--tracking-uri=http://me:secret@host",
        "--limit",
        "3",
    ]
    assert State((), False, words).command() == "harness run e.yaml --limit 3"


def test_the_command_in_a_report_makes_it_again(cli, tmp_path, monkeypatch):
    """With the user's own registry, in another folder, with options: the experiment's command and each run's."""
    import shlex

    (tmp_path / "net.py").write_text("from harness.nets import DigitsLinear as Net\n")
    (tmp_path / "r.yaml").write_text(
        "models:\n  mine: {builder: 'net.py:Net', weights: 'random:0', classes: digits, input: {channels: 1, size: 8}}\n"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.yaml").write_text("name: mine\nmodels: [mine]\ndatasets: [digits_test]\ntechniques: [saliency]\n")
    given = ["-r", "r.yaml", "run", "sub/e.yaml", "--limit", "3", "--device", "cpu"]
    cli(*given)
    cli("report", "mine", "--format", "json", "-o", "a")
    content = json.loads((tmp_path / "a" / "report.json").read_text())
    assert content["command"] == shlex.join(["harness", *given])
    cli("report", "mine", "--format", "html", "-o", "a")
    text = (tmp_path / "a" / "report.html").read_text()
    single = "harness --registry r.yaml run -m mine -d digits_test -t saliency --limit 3 --device cpu"
    assert single in text
    for command in (content["command"], single):
        assert "reused" in cli(*shlex.split(command)[1:])[1]
    out, err = cli("-r", "r.yaml", "verify", "a")
    assert "1 of 1 runs as the report claims" in out and "if you trust it" not in err
    # a registry names code to run: that of a report, which may be anybody's, is not read unasked
    (tmp_path / "net.py").write_text("raise SystemExit('code of the report was run')\n")
    (tmp_path / "another.yaml").write_text("models: {}\n")
    for others in ("", "another.yaml"):
        monkeypatch.setenv("HARNESS_REGISTRY", others)
        _, err = cli("verify", "a", code=2)
        assert "if you trust it, run `harness -r r.yaml verify a`" in err
        assert "no model 'mine'" in err


def test_compare_puts_models_side_by_side(cli, tmp_path):
    cli("compare", "digits_cnn", "digits_linear", *FAST, "-o", "c", "--format", "html")
    text = (tmp_path / "c" / "report.html").read_text()
    assert "not applicable" in text  # the linear model has no convolution
    assert "<h5>digits_linear</h5>" in text
    assert "two different models" in cli("compare", "digits_cnn", code=2)[1]


def test_an_experiment_file(cli, tmp_path):
    (tmp_path / "e.yaml").write_text(
        "name: maps\nmodels: [digits_cnn, digits_resnet]\ndatasets: [digits_test]\ntechniques:\n  - saliency: {values: {sweep: [absolute, signed]}}\nlimit: 3\n"
    )
    out, err = cli("run", "e.yaml")
    assert "4 of 4 runs finished" in out
    assert err.count("saliency on digits_resnet, digits_test") == 2
    assert "4/4 saliency on digits_resnet, digits_test: reused" in cli("run", "e.yaml")[1]
    cli("report", "maps", "--format", "html")
    assert (tmp_path / "out" / "maps" / "report.html").exists()
    assert "4 of 4 runs finished" in cli("run", "e.yaml", "--seed", "5", "--limit", "2")[0]
    cli("report", "maps", "--format", "json")
    runs = json.loads((tmp_path / "out" / "maps" / "report.json").read_text())["runs"]
    assert {run["seed"] for run in runs} == {5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "-m", "digits_cnn@", "-d", "digits", "-t", "saliency"], "after '@' only 'random'"),
        (["plugin", "new", "saliency"], "there is a technique or a package 'harness_saliency' already"),
        (["run", "-m", "squeeznet1_1", "-d", "digits", "-t", "saliency"], "no model 'squeeznet1_1'; did you mean 'squeezenet1_1'"),
        (["run", "-m", "digits_cnn", "-d", "digit", "-t", "saliency"], "did you mean 'digits'"),
        (["run", "-m", "digits_cnn", "-d", "digits", "-t", "salience"], "did you mean 'saliency'"),
        (["run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "-p", "vaules=signed"], "did you mean 'values'"),
        (
            ["run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "-p", "values=sined"],
            "saliency.values: input should be 'absolute' or 'signed'",
        ),
        (["run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "--device", "tpu"], "choose auto, cpu"),
        (["run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "--select", "1", "--limit", "2"], "--limit or --select, not both"),
        (["run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "--select", "a"], "write picture numbers with commas"),
        (["run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "--select", "99999"], "there is no picture 99999"),
        (
            ["run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "-t", "occlusion", "-p", "window=3"],
            "write TECHNIQUE.window=VALUE",
        ),
        (["run", "-m", "digits_cnn", "-t", "saliency"], "name a dataset"),
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["run", "x.yaml", "-m", "digits_cnn"], "not both"),
        (["run"], "give an experiment file"),
        (["audit", "alexnet"], "weights of 'alexnet' are not here"),
        (["run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "--device", "cpu:x"], "choose auto, cpu"),
        (["verify", "nowhere"], "has report.json"),
        (["report", "nowhere"], "no experiment 'nowhere'"),
        (["report", "nowhere", "--format", "docx"], "no renderer 'docx'"),
        (["train", "digit_cnn"], "no recipe 'digit_cnn'; did you mean 'digits_cnn'"),
        (["plugin", "check", "nothing"], "no installed package 'nothing'"),
        (["plugin", "new", "Bad Name"], "use lower-case letters"),
        (["-r", "nowhere.yaml", "models"], "nowhere.yaml: cannot be read"),
        (["audti"], "no command 'audti'; did you mean 'audit'"),
    ],
)
def test_bad_words_get_one_line_and_exit_code_2(cli, words, message, monkeypatch):
    from harness import weights

    monkeypatch.setattr(weights.TorchvisionWeights, "fetch", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    _, err = cli(*words, code=2)
    assert message in err
    assert len([line for line in err.splitlines() if line]) == 1, err


def test_debug_shows_the_traceback(capsys):
    assert invoke(["--debug", "show", "nothing"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_network_that_raises_gets_one_line(cli, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        raise KeyError('no such head')\n"
    )
    (tmp_path / "r.yaml").write_text("models:\n  mine: {builder: 'net.py:Net', input: {channels: 1, size: 8}}\n")
    _, err = cli("-r", "r.yaml", "show", "mine", code=1)
    assert err.startswith("error: KeyError: 'no such head'")
    _, err = cli("-r", "r.yaml", "run", "-m", "mine", "-d", "digits", "-t", "saliency", "--limit", "2", code=1)
    assert "FAILED: KeyError: 'no such head'" in err


def pictures(folder: Path, **extra: bytes) -> Path:
    folder.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "a.png")
    for name, content in extra.items():
        (folder / f"{name}.png").write_bytes(content)
    return folder


@pytest.mark.parametrize(("content", "message"), [(b"", "empty (0 bytes)"), (b"rubbish", "not a picture")])
def test_a_broken_picture_is_named_and_loses_nothing(cli, tmp_path, content, message):
    pictures(tmp_path / "set", broken=content)
    out, err = cli("run", "-m", "digits_cnn", "-d", "./set", "-t", "first_layer_filters", "-t", "saliency", code=2)
    assert f"broken.png: the file is {message}" in err or f"broken.png: {message}" in err
    assert "1 of 2 runs finished" in out


def test_pictures_of_any_kind_run(cli, tmp_path):
    root = pictures(tmp_path / "set")
    Image.new("L", (1, 1), 3).save(root / "dot.png")
    Image.new("RGB", (6000, 4000), "red").save(root / "large.jpg")
    Image.new("CMYK", (30, 30)).save(root / "cmyk.jpg")
    Image.new("RGBA", (30, 30)).save(root / "rgba.png")
    Image.fromarray(np.full((30, 30), 30000, np.uint16)).save(root / "sixteen.png")
    out, _ = cli("run", "-m", "squeezenet1_1", "-d", "./set", "-t", "saliency")
    assert "1 of 1 runs finished" in out


def test_an_output_folder_that_cannot_be_written(cli, tmp_path):
    (tmp_path / "file").write_text("")
    _, err = cli("audit", "digits_cnn", *FAST, "-o", "file/sub", code=2)
    assert "the report cannot be written there" in err
    assert "predictions" not in err  # said before the work, not after


def test_runs_that_cannot_be_kept(cli, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARNESS_RUNS", str(tmp_path / "file" / "runs"))
    _, err = cli("run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "--limit", "2", code=2)
    assert "HARNESS_RUNS" in err


def test_an_unreachable_server_is_told_within_seconds(cli, own_state):
    begun = time.monotonic()
    out, err = cli("run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "--limit", "2", "--tracking-uri", "http://127.0.0.1:9")
    assert time.monotonic() - begun < 30
    assert err.count("does not answer") == 1
    assert str(own_state / "spool") in out
    assert "1 runs sent" in cli("sync")[0]
    assert "0 runs sent" in cli("sync")[0]
    assert "saliency on digits_cnn, digits: reused" in cli("run", "-m", "digits_cnn", "-d", "digits", "-t", "saliency", "--limit", "2")[1]


def test_an_audit_without_its_server_still_reports(cli, tmp_path):
    cli("audit", "digits_linear", *FAST, "-o", "a", "--format", "html", "--tracking-uri", "http://127.0.0.1:9")
    assert (tmp_path / "a" / "report.html").exists()


KILLED = """
name: killed
models: [digits_cnn, digits_resnet]
datasets: [digits_test]
techniques:
  - saliency
  - occlusion: {window: 3, stride: 1}
  - class_visualization: {steps: {sweep: [20, 150, 21]}}
limit: 12
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_where_it_stopped(cli, tmp_path, own_state, empty_store, monkeypatch):
    """kill -9, start again: finished runs are not repeated, and the result is that of an undisturbed run."""
    (tmp_path / "k.yaml").write_text(KILLED)
    words = [sys.executable, "-m", "harness", "run", "k.yaml"]
    first = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    seen = 0
    for text in first.stderr:
        seen += ": " in text and text[0].isdigit()
        if seen == 4:
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stderr.close()
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("reused") >= 4
    assert again.stderr.count("reused") < 10
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(empty_store, other / "mlflow.db")
    with monkeypatch.context() as patch:
        patch.setenv("HARNESS_RUNS", str(other))
        assert "reused" not in cli("run", "k.yaml")[1]

    from harness.tracking import tracker_for, tracking_uri

    results = []
    for root in (own_state, other):
        _, runs = tracker_for(tracking_uri("", root), root).load("killed")
        results.append(
            [(r.record.key, {a.name: a.sha256 for a in r.record.artifacts}, [(m.name, m.value) for m in r.record.metrics]) for r in runs]
        )
    assert results[0] == results[1]
    assert len(results[0]) == 10
    client = tracker_for(tracking_uri("", own_state), own_state).client
    parents = client.search_runs([client.get_experiment_by_name("killed").experiment_id], "tags.`harness.kind` = 'experiment'")
    assert [p.info.status for p in parents] == ["FINISHED"]  # the interrupted one was taken up again


def test_training_again_gives_the_shipped_network(cli, tmp_path):
    """A recipe, its data and seed determine the network, up to the rounding of another machine."""
    import harness

    out, _ = cli("train", "digits_linear", "-o", "w", "--device", "cpu")
    card = json.loads((tmp_path / "w" / "digits_linear.json").read_text())
    shipped = json.loads((Path(harness.__file__).parent / "data" / "digits_linear.json").read_text())
    assert card["sha256"] in out
    assert card["recipe"] == shipped["recipe"]
    assert card["data"] == shipped["data"]
    assert card["final_loss"] == pytest.approx(shipped["final_loss"], rel=1e-3)
    assert card["accuracy"]["test"] == pytest.approx(shipped["accuracy"]["test"], abs=1 / 360 + 1e-9)


def test_a_recipe_is_trained_for_its_model(cli, tmp_path, registry):
    (tmp_path / "r.yaml").write_text(
        "models:\n  mine:\n    builder: harness.nets:DigitsLinear\n    weights: recipe:digits_linear\n    classes: digits\n    input: {channels: 1, size: 8, mean: [0.305], std: [0.376]}\n"
    )
    assert (
        "run `harness train digits_linear`" in cli("-r", "r.yaml", "run", "-m", "mine", "-d", "digits_test", "-t", "predictions", code=2)[1]
    )
    cli("train", "digits_linear", "--device", "cpu")
    cli("-r", "r.yaml", "run", "-m", "mine", "-d", "digits_test", "-t", "predictions")


def test_what_was_trained_is_found_by_the_registry_beside_it(cli, tmp_path):
    """The network of a file beside the recipe, its classes those of the folder's subfolders; the weights lie elsewhere."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:60], digits.target[:60], strict=True)):
        folder = tmp_path / "pictures" / ("odd" if label % 2 else "even")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "net.py").write_text(
        "from torch import nn\ndef Net(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    (tmp_path / "own" / "r.yaml").write_text(
        "recipes:\n  parity: {builder: './net.py:Net', args: {classes: 2}, dataset: ./pictures, input: {channels: 1, size: 8}, epochs: 2}\n"
    )
    out, _ = cli("-r", "own/r.yaml", "train", "parity", "-d", "./pictures", "-n", "mine", "-o", "made", "--device", "cpu")
    assert "harness -r made/mine.yaml audit mine -d ./pictures" in out
    out, _ = cli("-r", "made/mine.yaml", "run", "-m", "mine", "-d", "./pictures", "-t", "predictions")
    assert "1 of 1 runs finished" in out
    out, _ = cli("-r", "made/mine.yaml", "show", "mine")
    assert "2 named classes" in out


def test_what_is_trained_is_not_written_over_a_registry_in_use(cli, tmp_path):
    (tmp_path / "mine.yaml").write_text("models: {}\n")
    err = cli("-r", "mine.yaml", "train", "digits_linear", "-n", "mine", "-o", ".", code=2)[1]
    assert "mine.yaml is a registry in use" in err
    assert (tmp_path / "mine.yaml").read_text() == "models: {}\n"
    assert not (tmp_path / "mine.safetensors").exists()


def test_a_test_folder_without_some_classes_is_measured_by_the_networks(registry, tmp_path):
    from harness import train as trainer
    from harness.registry import RecipeEntry

    for place, names in (("train", "abc"), ("test", "ac")):
        for i, name in enumerate(names):
            (tmp_path / place / name).mkdir(parents=True)
            Image.new("L", (8, 8), 50 * i).save(tmp_path / place / name / "x.png")
    words = {"builder": "harness.nets:DigitsCNN", "epochs": 1, "input": {"channels": 1, "size": 8}}
    recipe = RecipeEntry(dataset=str(tmp_path / "train"), test_dataset=str(tmp_path / "test"), **words)
    data, test = trainer._datasets("r", recipe, registry)
    assert trainer._pixels(test, recipe, data.classes, "cpu")[1].tolist() == [0, 2]
    with pytest.raises(Exception, match="needs datasets with labels for its classes"):
        trainer._datasets(
            "r", recipe.model_copy(update={"dataset": str(tmp_path / "test"), "test_dataset": str(tmp_path / "train")}), registry
        )


def test_a_training_that_diverges_leaves_what_is_there(cli, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "recipes:\n  wild: {builder: 'harness.nets:DigitsCNN', dataset: digits_train, classes: digits, input: {channels: 1, size: 8},\n"
        "    epochs: 1, learning_rate: 1.0e+30}\n"
    )
    (tmp_path / "wild.safetensors").write_bytes(b"good weights")
    _, err = cli("-r", "r.yaml", "train", "wild", "-o", ".", code=2)
    assert "the loss stopped being finite; use a smaller learning_rate" in err
    assert (tmp_path / "wild.safetensors").read_bytes() == b"good weights"


def test_a_new_plugin_works_as_it_is(cli, tmp_path, monkeypatch):
    out, _ = cli("plugin", "new", "my_maps")
    folder = tmp_path / "harness-my-maps"
    assert str(folder.name) in out
    assert "exists already" in cli("plugin", "new", "my_maps", code=2)[1]
    monkeypatch.syspath_prepend(folder)
    import importlib

    from harness.testing import check_technique

    assert check_technique(importlib.import_module("harness_my_maps").MyMaps) == []
    compile((folder / "tests" / "test_my_maps.py").read_text(), "test", "exec")
    assert "standard" in importlib.import_module("harness_my_maps").MyMaps.audit  # a part of audits
    assert 'my_maps = "harness_my_maps"' in (folder / "pyproject.toml").read_text()


def test_checking_a_package(cli):
    out, _ = cli("plugin", "check", "harness_weights")
    assert "ok      linear_templates" in out


def test_output_into_a_closed_pipe_is_quiet():
    done = subprocess.run(f"{sys.executable} -m harness techniques --json | head -c 1", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_a_generator_of_ones_own_pictures(cli, tmp_path):
    """Trained on a folder for another layer, named by the registry file it comes with, used by the technique."""
    from sklearn.datasets import load_digits

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(load_digits().images[:60]):
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    words = ["train", "generator", "-d", "pictures", "--encoder", "digits_cnn", "--layer", "features.6", "-n", "mine", "-o", "made"]
    out, _ = cli(*words, "--epochs", 3, "--device", "cpu")
    assert "on 12 pictures kept apart" in out
    assert "harness -r made/mine.yaml run -m digits_cnn" in out
    run = ["-r", "made/mine.yaml", "run", "-m", "digits_cnn", "-d", "digits", "-t", "deep_generator", "-p", "steps=5"]
    cli(*run, "-p", "generator=mine")
    assert "no generator 'mime'; did you mean 'mine'" in cli(*run, "-p", "generator=mime", code=2)[1]
    (tmp_path / "made" / "mine.safetensors").write_bytes(b"other")
    assert "sha256" in cli(*run, "-p", "generator=mine", "-p", "decay=0.02", code=2)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "digits_cnn", "--layer", "features.1"], "trains a network, which has no --layer"),
        (["train", "digits_cnn", "-d", "photos"], "needs datasets with labels for its classes"),
        (["train", "generator", "--style", "a.png"], "trains a generator, which has no --style"),
        (["train", "generator", "--start", "ihc_style"], "trains a generator, which has no --start"),
        (["train", "generator", "-d", "nowhere/"], "no such folder"),
        (["train", "generator", "--encoder", "squeezenet"], "no model 'squeezenet'"),
        (["train", "digits_cnn_code", "--layer", "classifier.9"], "no layer 'classifier.9'"),
        (
            ["run", "-m", "digits_cnn", "-d", "digits", "-t", "deep_generator", "-p", "judge=digits_cn"],
            "no model 'digits_cn'; did you mean",
        ),
    ],
)
def test_what_cannot_be_trained_or_used(cli, words, message):
    assert message in cli(*words, code=2)[1]


def test_a_network_is_trained_on_a_folder_of_ones_own(cli, tmp_path):
    """Labelled by its subfolders, every fifth picture kept apart; what a recipe does not take is told."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for i in range(200):
        folder = tmp_path / "pets" / str(found.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((found.images[i] * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    out, _ = cli("train", "digits_linear", "-d", "./pets", "--limit", 100, "--epochs", 2, "-n", "mine", "-o", "made", "--device", "cpu")
    card = json.loads((tmp_path / "made" / "mine.json").read_text())
    assert card["data"]["pictures"] == 80
    assert card["test_data"]["pictures"] == 20
    assert "20 pictures kept apart" in out
    out, _ = cli("train", "digits_cnn_fgsm", "-d", "./pets", "--epochs", 1, "-n", "robust", "-o", "made", "--device", "cpu")
    assert "under attack" in out
    assert len(json.loads((tmp_path / "made" / "robust.json").read_text())["course"]) == 1
    assert "has no --layer; it takes --dataset, --epochs, --limit" in cli("train", "digits_linear", "--layer", "x", code=2)[1]


def test_a_style_of_ones_own(cli, tmp_path):
    """A network is trained for a picture, takes up a further style, and is used; the picture's content belongs to the run's key."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 60, 3), dtype=np.uint8)).save(tmp_path / "painting.png")
    (tmp_path / "r.yaml").write_text(
        "styler_recipes:\n  tiny: {encoder: snow_cnn, content_layer: features.4, style_layers: [features.1, features.4], dataset: photos, "
        "styles: ['textures:ihc.png'], steps: 3, batch_size: 1, crop: 32, style_size: 48, width: 4, blocks: 1}\n"
    )
    words = ["-r", "r.yaml", "train", "tiny", "--style", "painting.png", "-n", "mine", "-o", "made", "--device", "cpu"]
    out, _ = cli(*words)
    assert "harness -r made/mine.yaml run -m snow_cnn" in out
    run = ["-r", "r.yaml", "-r", "made/mine.yaml", "run", "-m", "snow_cnn", "-d", "photos", "--limit", 1, "-p", "styler=mine"]
    made = cli(*run, "-t", "fast_style_transfer", "-p", "size=48", "-p", "steps=2")
    assert "nothing is made slowly" not in "".join(made)  # its recipe comes along, by which fast and slow are compared
    assert "reused" in cli(*run, "-t", "fast_style_transfer", "-p", "size=48", "-p", "steps=2")[1]
    assert "no styler 'mime'; did you mean 'mine'" in cli(*run[:-1], "styler=mime", "-t", "fast_style_transfer", code=2)[1]
    cli("-r", "r.yaml", "-r", "made/mine.yaml", "train", "tiny", "--base", "mine", "-n", "two", "-o", "made", "--device", "cpu")
    assert json.loads((tmp_path / "made" / "two.json").read_text())["styles"] == ["painting", "ihc"]
    onward = ["-r", "r.yaml", "-r", "made/mine.yaml", "train", "tiny", "--start", "mine", "-n", "on", "-o", "made", "--device", "cpu"]
    cli(*onward)
    assert json.loads((tmp_path / "made" / "on.json").read_text())["start"]["card"]["name"] == "mine"
    assert "give one of them" in cli(*onward, "--base", "mine", code=2)[1]
    # What is given takes the place of the recipe's other one, and of `start` in the card.
    cli("-r", "r.yaml", "-r", "made/mine.yaml", "-r", "made/on.yaml", "train", "on", "--base", "mine", "-n", "three", "-o", "made")
    assert "start" not in json.loads((tmp_path / "made" / "three.json").read_text())
    assert "there is no picture" in cli("-r", "r.yaml", "train", "tiny", "--style", "none.png", "-o", "made", code=2)[1]
    slow = [
        "run",
        "-m",
        "snow_cnn",
        "-d",
        "photos",
        "--limit",
        1,
        "-t",
        "style_transfer",
        "-p",
        "size=48",
        "-p",
        "steps=2",
        "-p",
        "coarse=0",
    ]
    cli(*slow, "-p", "style=painting.png")
    assert "reused" in cli(*slow, "-p", "style=painting.png")[1]
    Image.new("RGB", (48, 48), "red").save(tmp_path / "painting.png")
    fast = [*run, "-t", "fast_style_transfer", "-p", "size=48", "-p", "steps=2"]
    assert "reused" in cli(*fast)[1]  # what it was trained on has been kept beside it
    Image.new("RGB", (48, 48), "red").save(tmp_path / "made" / "mine-style-0.png")
    assert "reused" not in cli(*fast)[1]
    assert "reused" not in cli(*slow, "-p", "style=painting.png")[1]
    assert "there is no file 'none.png'" in cli(*slow, "-p", "style=none.png", code=2)[1]
