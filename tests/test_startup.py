"""The settings of a program that runs simulations, and its cache of compiled programs."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import equinox._config
import jax
import pytest

from sims import startup


def test_what_is_set_already_is_kept(monkeypatch):
    names = ("EQX_ON_ERROR", "TF_CPP_MIN_LOG_LEVEL")
    for kept in ("raise", "0"), ("off", "1"):
        for name, value in zip(names, kept, strict=True):
            monkeypatch.setenv(name, value)
        startup.prepare_environment()
        assert tuple(os.environ[name] for name in names) == kept
    for name in names:
        monkeypatch.delenv(name)
    startup.prepare_environment()
    assert tuple(os.environ[name] for name in names) == ("nan", "3")


def test_the_tests_themselves_are_prepared():
    assert os.environ["EQX_ON_ERROR"] == equinox._config.EQX_ON_ERROR


@pytest.mark.parametrize(
    ("variables", "cache", "root"),
    [
        ({"XDG_CACHE_HOME": "/caches"}, None, "/caches/dynascope"),
        ({"HOME": "/home/someone"}, None, "/home/someone/.cache/dynascope"),
        ({"HOME": "/home/someone", "DYNASCOPE_CACHE": "~/moved"}, None, "/home/someone/moved"),
        ({"DYNASCOPE_CACHE": "off"}, None, None),
        ({"DYNASCOPE_CACHE": "/moved"}, "off", None),
        ({"DYNASCOPE_CACHE": "off"}, Path("/again"), "/again"),
    ],
)
def test_the_cache_is_where_it_was_asked_for(variables, cache, root, monkeypatch):
    monkeypatch.setattr(startup.sys, "platform", "linux")
    for name in ("XDG_CACHE_HOME", "DYNASCOPE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert startup.cache_root(cache) == (None if root is None else Path(root))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bound the mappings of a process")
def test_programs_are_forgotten_before_the_process_is_out_of_mappings():
    traced = []
    function = jax.jit(lambda x: traced.append(x) or x + 0.125)
    bound = int(Path("/proc/sys/vm/max_map_count").read_text())
    filled = Path("/proc/self/maps").read_text().count("\n") / bound
    for share, times in (1.0, 1), (1.2 * filled, 1), (0.9 * filled, 2):
        assert startup.forget_programs(share) == (share < filled)
        assert function(1.0) == 1.125
        assert len(traced) == times


def test_machines_with_other_processors_share_nothing(monkeypatch):
    one = startup._machine()
    assert one == startup._machine()
    monkeypatch.setattr(startup.platform, "machine", lambda: "another")
    assert one != startup._machine()


def test_the_programs_used_last_are_kept(tmp_path, monkeypatch):
    folders = tmp_path / "xla-one", tmp_path / "xla-two"
    for age, name in enumerate("abcd"):
        file = folders[age % 2] / f"{name}-cache"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(100))
        os.utime(file, (1e9 - age, 1e9 - age))
    mine = tmp_path / "notes"
    mine.write_bytes(bytes(1000))
    monkeypatch.setattr(startup, "_CACHE_BOUND", 250)
    startup._prune(tmp_path)
    assert sorted(file.name for file in tmp_path.rglob("*-cache")) == ["a-cache", "b-cache"]
    assert mine.exists()


def test_no_cache_where_none_can_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert startup._open_cache(tmp_path / "file") is None
    assert startup._open_cache(tmp_path / "file" / "folder") is None
    assert startup._open_cache(tmp_path / "folder").is_dir()
    monkeypatch.setattr(startup, "_FREE", 2**80)
    assert startup._open_cache(tmp_path / "folder") is None


# Prints whether the program was found in the cache; where LIMIT is set no file may be longer than that.
PROGRAM = """
import os, resource, sys
from sims import startup
if "LIMIT" in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]), resource.RLIM_INFINITY))
startup.prepare_environment()
assert not {"jax", "equinox"} & set(sys.modules)
startup.configure_jax(x64=True)
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
print(any(hits), jax.numpy.ones(()).dtype)
"""


def run(cache, **variables):
    environment = {**os.environ, "DYNASCOPE_CACHE": str(cache), **variables}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # pytest's plugins import jax, which sets it
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_a_second_process_finds_what_the_first_compiled_and_nothing_is_said(tmp_path):
    assert run(tmp_path) == "False float64"
    # As on machines where XLA takes its own preferences for features that are missing.
    for file in tmp_path.rglob("*-cache"):
        program = zlib.decompress(file.read_bytes())
        file.write_bytes(zlib.compress(program.replace(b"+sse4.2", b"+sse9.9")))
    assert run(tmp_path) == "True float64"


def test_a_full_disk_is_silent(tmp_path):
    for _ in range(2):  # the second finds programs that were cut off
        assert run(tmp_path, LIMIT="64") == "False float64"
        assert {file.stat().st_size for file in tmp_path.rglob("*-cache")} == {64}


def test_a_program_without_cache(tmp_path):
    assert run("off", XDG_CACHE_HOME=str(tmp_path)) == "False float64"
    assert list(tmp_path.iterdir()) == []
