"""The benchmark runner: what it writes, and what it refuses to time or write."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch

from benchmarks import machine, registry, run as runner
from benchmarks.checks import CheckFailed, Run
from benchmarks.registry import Benchmark
from benchmarks.timing import medians

ROOT = pathlib.Path(__file__).parents[3]
CPU = torch.device("cpu")


def fake(error=0.0):
    def measure(run, lengths=(3, 5)):
        """A fake.

        More about it."""
        run.check("it is right", error, 1e-6)
        rows = []
        for length in lengths:
            x = torch.ones(length)
            times = run.time({"ours": x.sum, "theirs": x.mean}, repeats=7)
            rows.append({"op": "fake", "L": length, "ms": times["ours"].ms, "baselines": {"theirs": times["theirs"].ms}})
        return rows
    return Benchmark(measure, ("cpu",), lambda rows, path: path.write_bytes(b"\x89PNG"))


@pytest.fixture
def bench(monkeypatch, capfd, tmp_path):
    """Runs the fake benchmark, wrong by ``error``; returns the exit status, standard error and the files written."""
    def call(*arguments, error=0.0):
        monkeypatch.setitem(registry.BENCHMARKS, "fake", fake(error))
        monkeypatch.setattr(runner, "RESULTS", tmp_path / "default")
        capfd.readouterr()
        status = runner.main([str(argument) for argument in arguments])
        return status, capfd.readouterr().err, sorted(path for path in tmp_path.rglob("*") if path.is_file())
    return call


def test_result_format(bench, tmp_path):
    status, _, files = bench("fake", "--output", tmp_path / "out", "--lengths", "2,4")
    assert status == 0
    folder = tmp_path / "out" / machine.describe(CPU)["name"]
    assert files == [folder / "fake.json", folder / "fake.png"]
    result = json.loads((folder / "fake.json").read_text())
    assert list(result) == ["benchmark", "machine", "versions", "commit", "command", "checks", "rows"]
    assert result["benchmark"] == "fake"
    assert result["command"] == f"python -m benchmarks.run fake --output {tmp_path / 'out'} --lengths 2,4"
    assert {"coda_attn", "python", "torch", "cuda", "cudnn"} <= result["versions"].keys()
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert result["checks"] == [{"check": "it is right", "error": 0.0, "allowed": 1e-6}]
    assert [row["L"] for row in result["rows"]] == [2, 4]
    assert all(row["ms"] > 0 and row["baselines"]["theirs"] > 0 for row in result["rows"])


def test_default_folder_and_quick(bench, tmp_path):
    assert bench("fake", "--quick")[2] == []
    assert [path.name for path in bench("fake")[2]] == ["fake.json", "fake.png"]


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_result_is_neither_timed_nor_written(bench, monkeypatch, error):
    monkeypatch.setattr("benchmarks.checks.medians", lambda *a, **k: pytest.fail("timed"))
    status, said, files = bench("fake", error=error)
    assert status == 1
    assert files == []
    assert said.splitlines()[-1].startswith("benchmarks: check failed, nothing timed or written: it is right")


def test_nothing_is_timed_before_a_check():
    with pytest.raises(CheckFailed, match="checked"):
        Run(CPU).time({"x": lambda: None})


def test_a_failed_write_leaves_the_old_result(bench, monkeypatch, tmp_path):
    bench("fake")
    path, = tmp_path.rglob("fake.json")
    before = path.read_text()

    def breaks(self, *arguments, **options):
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, "write_text", breaks)
    with pytest.raises(OSError, match="disk full"):
        bench("fake")
    assert path.read_text() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["fake.json", "fake.png"]


def test_redraw(bench, tmp_path):
    bench("fake")
    png, = tmp_path.rglob("fake.png")
    png.unlink()
    assert bench("--plot", png.with_suffix(".json"))[0] == 0
    assert png.exists()
    other = tmp_path / "other.json"
    other.write_text("[1]")
    status, said, _ = bench("--plot", other)
    assert status == 2 and "holds no results" in said


@pytest.mark.parametrize("arguments, said", [
    (["nothing"], "benchmark 'nothing' is not known"),
    (["fake", "--all"], "give one of them"),
    (["fake", "--device", "cuda"], "does not run on cuda"),
    (["fake", "--model", "x"], "fake has no --model; it takes --lengths"),
    (["fake", "--lengths", "1,x"], "not a valid integer"),
    (["fake", "--output", "/proc/none"], "cannot write"),
    (["smollm2_cpu", "--model", "no/such/folder"], "is not a folder"),
])
def test_bad_input_is_one_line_and_status_2(bench, arguments, said):
    status, err, files = bench(*arguments)
    assert status == 2
    assert err.splitlines()[-1].startswith("benchmarks: error: ") and said in err.splitlines()[-1]
    assert files == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU runs these")
def test_gpu_benchmarks_say_that_they_need_one(bench):
    status, said, _ = bench("diff_attention")
    assert status == 2 and "needs an NVIDIA GPU" in said


def test_list_names_every_benchmark(capsys):
    assert runner.main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(registry.BENCHMARKS)


def test_all_runs_each_in_a_process_of_its_own(monkeypatch):
    ran = []
    monkeypatch.setattr(runner.subprocess, "run", lambda line, **k: ran.append(line) or subprocess.CompletedProcess(line, len(ran) % 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main(["--all", "--quick"]) == 1
    assert ran == [[sys.executable, "-m", "benchmarks.run", name, "--quick"] for name in ("beyond_context", "smollm2_cpu")]


def test_medians_take_turns():
    order = []
    times = medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, repeats=3, least=3)
    assert "".join(order) == "aabb" + "ab" * 3
    assert times["a"].repeats == 3 and times["a"].least <= times["a"].ms <= times["a"].most


def test_machine_names():
    assert machine._slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert machine._slug("cpu Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz 2cores") == "cpu-intel-xeon-platinum-8481c-2cores"


def test_commit(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert machine.commit(tmp_path) is None
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    clean = machine.commit(tmp_path)
    assert len(clean) == 40
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "x.json").touch()
    assert machine.commit(tmp_path) == clean
    (tmp_path / "new").touch()
    assert machine.commit(tmp_path) == clean + "-dirty"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2_cpu", "beyond_context"])
def test_quick_run_of_a_random_model(name, tmp_path):
    subprocess.run([sys.executable, "-m", "benchmarks.run", name, "--quick", "--model", "random:mistral-tiny", "--output", str(tmp_path)],
                   cwd=ROOT, check=True)
    path, = tmp_path.rglob(f"{name}.json")
    result = json.loads(path.read_text())
    assert result["checks"] and path.with_suffix(".png").exists()
    rows = result["rows"]
    if name == "beyond_context":
        assert [row["ratio"] is None for row in rows].count(False) == 3
        return
    read = [row for row in rows if row["op"] == "read"]
    assert len({row["state_bytes"] for row in read}) == 1
    assert {row["op"] for row in rows} == {"read", "prefill", "decode_step"}
    assert all(value for row in rows if "ms" in row for value in (row["ms"], *row["baselines"].values()))
