"""ptq report: the page of a sweep beside its table, commands that run one point, and what it says of a sweep that is none."""

import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys

import pyarrow.parquet

from ptq.cli.app import main
from ptq.sweep.page import command_of, write_page
from ptq.sweep.points import Point, Sweep, read_sweep
from ptq.sweep.status import launching

ROOT = pathlib.Path(__file__).parents[3]


def test_the_page_has_every_point_and_the_table_lies_beside_it(swept, capsys):
    assert main(["report", str(swept.main)]) == 0
    path = swept.main / "report.html"
    assert capsys.readouterr().out == f"page: {path}\n"
    text = path.read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [p["values"]["status"] for p in data["points"]] == ["done", "done", "refused"] * 2
    first = data["points"][0]
    assert len(first["errors"]) == 28 and len(first["kl"]) == 6 and first["seconds"]["quantize"] >= 0
    assert first["fingerprints"]["identity"] == swept.table(swept.main)[0]["identity"]
    assert first["channels"][0]["before"]["high"]
    assert 'http-equiv="refresh"' not in text
    assert pyarrow.parquet.read_table(swept.main / "points.parquet").num_rows == 6


def test_a_points_command_is_the_sweeps_with_its_own_values(swept):
    # As it was typed first: another test types the same sweep in other words, and the folder has the last ones.
    typed = (
        "ptq",
        "run",
        "--config",
        str(swept.recipe),
        "-m",
        "steps.smooth.alpha=0.3,0.5",
        "scheme.weight.bits=4,8,9",
    )
    sweep = dataclasses.replace(read_sweep(swept.main), command=typed)
    words = shlex.split(command_of(sweep, sweep.points[3]))
    assert words == ["ptq", "run", "--config", str(swept.recipe), "steps.smooth.alpha=0.5", "scheme.weight.bits=4"]


def test_words_of_sweeps_and_swept_groups_are_left_out_of_a_points_command(tmp_path):
    command = [
        "python",
        "main.py",
        "-m",
        "--zip",
        "--jobs",
        "4",
        "--launcher=ray",
        "launcher.address=x",
        "scheme=a,b",
        "+steps.x.y=1,2",
        "seed=3",
    ]
    sweep = Sweep("n", tmp_path, (), tuple(command), "/")
    sweep = dataclasses.replace(sweep, points=(Point(1, ("scheme=a", "steps.x.y=1"), None),))
    assert shlex.split(command_of(sweep, sweep.points[0])) == ["python", "main.py", "seed=3", "scheme=a", "steps.x.y=1"]


def test_watching_a_sweep_that_has_ended_writes_once(swept, tmp_path, capsys):
    assert main(["report", str(swept.main), "--watch", "1", "--output", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").is_file()
    assert "refresh" not in (tmp_path / "a.html").read_text().split("</head>")[0]


def test_a_running_sweep_has_a_page_that_loads_itself_again(swept, tmp_path):
    sweep = dataclasses.replace(read_sweep(swept.main), folder=tmp_path)
    sweep.write()
    with launching(tmp_path):
        path, open_ = write_page(tmp_path, refresh=5)
    assert open_
    assert '<meta http-equiv="refresh" content="5">' in path.read_text()


def test_a_page_whose_launcher_has_died_waits_for_nobody(swept, tmp_path):
    sweep = dataclasses.replace(read_sweep(swept.main), folder=tmp_path)
    sweep.write()
    dead = f"import os, pathlib\nfrom ptq.sweep.status import launching\nwith launching(pathlib.Path({str(tmp_path)!r})): os._exit(0)"
    assert subprocess.run([sys.executable, "-c", dead], cwd=ROOT).returncode == 0
    assert list((tmp_path / "launchers").iterdir())
    path, open_ = write_page(tmp_path, refresh=5)
    assert not open_ and "refresh" not in path.read_text().split("</head>")[0]


def test_an_empty_sweep_has_a_page_that_says_so(swept, tmp_path, capsys):
    sweep = dataclasses.replace(read_sweep(swept.main), folder=tmp_path, points=())
    sweep.write()
    assert main(["report", str(tmp_path)]) == 0
    assert "No point is done yet" in (tmp_path / "report.html").read_text()
    assert main(["compare", str(tmp_path)]) == 2
    assert "0 of its points are done: a comparison needs two" in capsys.readouterr().err


def test_a_report_of_what_is_no_sweep_or_damaged_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    (tmp_path / "sweep.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "holds no sweep" in err and "damaged" in err and err.count("\n") == 2
    assert main(["report", str(tmp_path), "--watch", "0"]) == 2
