"""Configuration of the whole test suite."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

# Scripts that tests check or run, and no tests.
collect_ignore_glob = ["typing/user_script.py", "frameworks/scripts/*"]

# Before matplotlib is imported: the tests need no display.
os.environ.setdefault("MPLBACKEND", "Agg")

# Most of the time goes into compiling, and XLA's older code generator for CPUs does that in less.
# XLA aborts at a flag that it does not know.
_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # has the flags of the process that started it
if (0, 8) <= jax.__version_info__ < (0, 11) and not _WORKER:
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1"
    )

# Several devices for the tests of sharding; the others use the first. Before JAX starts.
jax.config.update("jax_num_cpu_devices", 4)

# What was compiled once is kept for the next run.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache/jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# An example's first run compiles, so its time says nothing. Derandomized: a failure on one machine
# is a failure on every machine.
hypothesis.settings.register_profile("samax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("samax")


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test: the others run as users do, in float32."""
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64(True)
    else:  # JAX 0.6 and 0.7
        from jax.experimental import enable_x64

        context = enable_x64(True)
    with context:
        yield


def _optimized(item: pytest.Item) -> bool:
    return item.get_closest_marker("optimized") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests marked `optimized` last, so that the switch below is turned once."""
    items.sort(key=_optimized)


_compiled: list[float] = []
"""The seconds of each program that was compiled since the last time that all were dropped."""


@jax.monitoring.register_event_duration_secs_listener
def _note(event: str, seconds: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(seconds)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests compile much and compute little: they go without most of XLA's optimizations.

    Those marked `optimized` are compiled as users compile. Not a fixture: a module's come first.

    What is in memory was compiled with the switch as it was, so turning it drops that. So does a
    large number of programs: after some thousands each new one takes four times as long to lower.
    """
    turned = jax.config.read("jax_disable_most_optimizations") == _optimized(item)
    if turned:
        jax.config.update("jax_disable_most_optimizations", not _optimized(item))
    if turned or len(_compiled) > 600:
        jax.clear_caches()
        _compiled.clear()
