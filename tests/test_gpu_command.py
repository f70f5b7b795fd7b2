"""build_tools/gpu.py, tested without a GPU: failing phases, time limits and exit codes."""

import subprocess
import sys
import time

import pytest

from benchmarks.cases import CASES, ON_GPU
from build_tools import gpu

FIRST = "import sys; print('was here', *sys.argv[1:]); "


def say(code: str = "", *arguments: str) -> list[str]:
    return [sys.executable, "-c", FIRST + code, *arguments]


@pytest.fixture
def phases(monkeypatch):
    """Phases with commands that a test sets. All other phases succeed."""
    table = {}
    monkeypatch.setattr(gpu, "describe_gpu", lambda: "a GPU")
    monkeypatch.setattr(gpu, "commands", lambda phase, out: table.get(phase, [say("", phase)]))
    return table


def test_a_failing_phase_does_not_stop_the_others(phases, tmp_path, capsys):
    phases["test"] = [say("sys.exit(3)"), say("", "after a failure")]
    phases["profile"] = [["no-such-profiler"]]
    assert gpu.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    table = said.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table] == list(gpu.SHARES)
    ends = dict(zip(gpu.SHARES, table, strict=True))
    assert ends.pop("test").endswith("FAILED: exit code 3")
    assert ends.pop("profile").endswith("FAILED: no-such-profiler is not installed")
    assert all(line.endswith("done") for line in ends.values())
    assert "was here after a failure" in (tmp_path / "test.txt").read_text()
    assert "was here sanitize" in (tmp_path / "sanitize.txt").read_text()


def test_a_single_phase_runs_after_the_build(phases, tmp_path):
    assert gpu.main(["bench", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["bench.txt", "build.txt"]


def test_a_phase_that_exceeds_its_time_is_killed_with_its_children(phases, tmp_path, capsys):
    child = "import subprocess; subprocess.Popen(['sleep', '600']); import time; time.sleep(600)"
    phases["build"] = [say(child)]
    start = time.monotonic()
    assert gpu.main(["build", "--out", str(tmp_path), "--minutes", "0.03"]) == 1
    assert time.monotonic() - start < 30
    assert "FAILED: ran out of time" in capsys.readouterr().out


def test_an_unknown_phase_is_an_error(phases, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["tests", "--out", str(tmp_path)])
    assert (
        "there is no phase tests; there are build, smoke, pairs, test, bench, profile, sanitize"
        in capsys.readouterr().err
    )


def test_it_reports_that_there_is_no_gpu():
    run = subprocess.run(
        [sys.executable, "-m", "build_tools.gpu"], capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert run.returncode == 1 and "needs a GPU that torch" in run.stderr


def test_all_commands_and_their_options_exist(tmp_path):
    """The parser of each program has all options that the phases pass to it."""
    timed = {phase: gpu.commands(phase, tmp_path) for phase in ("bench", "pairs")}
    named = {phase: [command[command.index("--case") + 1] for command in timed[phase]] for phase in timed}
    assert named["bench"] == ON_GPU
    assert named["pairs"] == [case for case in ON_GPU if "mine_hardest" in CASES[case].ops]
    flags: dict[str, set[str]] = {}  # by module: the options that its commands pass
    others = [command for phase in ("smoke", "profile", "test") for command in gpu.commands(phase, tmp_path)]
    for command in [*timed["bench"], *timed["pairs"], *others]:
        assert command[1] == "-m"
        own = command[3 : command.index("--") if "--" in command else None]  # arguments of pytest follow --
        flags.setdefault(command[2], set()).update(flag for flag in own if flag.startswith("--"))
    for module, passed in flags.items():
        help_of = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
        assert all(flag in help_of.stdout for flag in passed), (module, passed)
    assert [command[2] for command in gpu.commands("sanitize", tmp_path)] == ["memcheck", "racecheck"]
    assert gpu.settings("sanitize", tmp_path)["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "TRITON_CACHE_DIR" in gpu.settings("test", tmp_path)
