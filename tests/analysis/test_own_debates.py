"""A file of debates and a checkpoint give vectors, tables, figures and a page; bad sizes end in one line."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from peft import LoraConfig, get_peft_model

import steerkit as sk
from analysis import own_debates
from analysis.__main__ import main
from analysis.inputs import inputs_of_files
from analysis.own_page import protocol_doses, sentences
from analysis.own_plan import Analysis, dropped_letters, names_of, planned, sampled_layers, sizes_of
from steerkit.io.run_folder import RunFolderBusy
from steerkit.io.tables import read_table
from steerkit.models.blocks import NoResidualStream
from steerkit.text.traces import read_traces
from tests.tiny import tiny_model, tiny_tokenizer

SMALL = (
    "grid.coefficients=[1]", "grid.negative=[]", "grid.positions=[\"last\"]", "grid.extents=[\"generated\"]",
    "grid.validation=4", "grid.test=4", "grid.controls=2", "grid.max_new_tokens=6", "layers=2", "probed=12",
    "protocol.control_doses=[0.2]", "protocol.coefficients=[1,2]", "protocol.doses=[0.2]", "protocol.controls=2",
    "protocol.validation=2", "protocol.test=4", "protocol.max_new_tokens=6",
)  # fmt: skip


def untagged(count: int = 60) -> list[dict]:
    said = ("first {}", "so second {}", "third {} it is")
    return [
        {"question": f"{n}+0", "rounds": [[text.format(n) for text in said] for _ in "12"], "consensus": f"It is {n}"}
        for n in range(count)
    ]


def named(count: int = 60) -> list[dict]:
    """The same debates by agents with names, who speak in another order in each second record."""
    names = ("Ann", "Bob", "Cy")
    return [
        {
            "question": record["question"],
            "turns": [
                {"agent": name, "round": number, "text": text}
                for number, texts in enumerate(record["rounds"], 1)
                for name, text in list(zip(names, texts, strict=True))[:: 1 if index % 2 else -1]
            ],
        }
        for index, record in enumerate(untagged(count))
    ]


def written(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    tiny_model("llama", context=1024).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts that each sweep writes; the text at coefficient 0 is written once per prompt."""
    counts = []
    original = sk.sweep

    def sweep(*arguments, **options):
        result = original(*arguments, **options)
        counts.append(int((result.table["coefficient"] != 0).sum()) + result.table["prompt_id"].nunique())
        return result

    monkeypatch.setattr(sk, "sweep", sweep)
    return counts


def command(tmp_path: Path, checkpoint: Path, *more: str) -> list[str]:
    call = ["agents", "--traces", str(tmp_path / "my.jsonl"), "--checkpoint", str(checkpoint)]
    settings = [part for setting in SMALL for part in ("--set", setting)]
    return [*call, "--out", str(tmp_path / "mine"), *settings, *more]


def test_untagged_records_and_a_checkpoint_give_everything_and_a_second_call_only_reads(
    tmp_path, checkpoint, monkeypatch, capsys
) -> None:
    written(tmp_path / "my.jsonl", named())
    call = command(tmp_path, checkpoint, "--base", str(checkpoint), "--cast", "diverse")
    texts = counted(monkeypatch)
    main(call)
    (planned,) = re.findall(r"Texts in all: ([\d,]+),", capsys.readouterr().err)
    assert int(planned.replace(",", "")) == pytest.approx(sum(texts), rel=0.2)
    out = tmp_path / "mine"
    debates = read_traces(out / "traces.jsonl")
    assert len(debates) == 60 and all(trace.turns[0].text.startswith("first") for trace in debates)
    assert json.loads((out / "agents.json").read_text()) == {"1": "Ann", "2": "Bob", "3": "Cy"}
    vector = sk.SteeringVector.load(out / "stages" / "checkpoint" / "agent-2.safetensors")
    assert set(vector.layers) == {1, 2}
    gains = read_table(out / "gains.csv")[0]
    assert set(gains["over"]) == {"coefficient 0", "random", "matched", "shuffled"}
    assert set(gains["stage"]) == {"base", "checkpoint"}
    protocol = read_table(out / "protocol.csv")[0]
    assert {"area, own", "area over random", "area over base"} <= set(protocol["measure"])
    assert set(protocol["context"]) == {"tagged", "cast"}
    probes = read_table(out / "separability.csv")[0]
    assert {"embed", "1", "2"} <= set(probes["layer"].astype(str)) and "3" not in set(probes["layer"].astype(str))
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == len(list((out / "figures").glob("*.png"))) >= 8
    assert "names its agent with held-out accuracy" in page and "minus that of random directions" in page
    assert "Agent Bob, not named in the prompt" in page and "protocol, relative doses 0, 0.2: the area" in page
    assert "n = 12 questions." in page and "n = 4 questions. Fewer than 10 questions" in page
    assert set(protocol_doses(out)["stage"]) == {"base", "checkpoint"}
    before = (out / "gains.csv").read_bytes()
    monkeypatch.setattr(sk, "load", lambda *_, **__: pytest.fail("loaded again"))
    main(call)
    assert (out / "gains.csv").read_bytes() == before
    assert "Page: " in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_reads_no_weights(tmp_path, checkpoint, monkeypatch, capsys) -> None:
    written(tmp_path / "my.jsonl", untagged())
    monkeypatch.setattr(sk, "load", lambda *_, **__: pytest.fail("loaded"))
    main(command(tmp_path, checkpoint, "--dry-run"))
    shown = capsys.readouterr().err
    assert "Debates: 36 for vectors, 6 to choose settings, 18 to report; 3 agents" in shown
    assert "4 layers, tried: 1, 2." in shown and not (tmp_path / "mine").exists()
    assert "First prompt: 'Problem: " in shown and "hours on cpu" in shown
    counted = [int(line.split(": ")[1].replace(",", "")) for line in shown.splitlines() if line.startswith("Texts, ")]
    assert f"Texts in all: {sum(counted):,}" in shown


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (untagged(8), "expected at least {'vectors': 12, 'validation': 4, 'test': 8} questions"),
        ([*untagged(60), untagged(1)[0]], "got 1 repeated questions"),
        ([*untagged(60), {"question": "q", "rounds": [["a", "b"]]}], "expected the same two or more agents"),
        ([*untagged(60), {"question": "q"}], "my.jsonl, record 61: expected the keys"),
        (
            [*untagged(60), {"question": "q", "rounds": [["x " * 600, "b", "c"]]}],
            "fit the checkpoint's context of 1024",
        ),
    ],
    ids=["few", "repeated", "agents", "keys", "long"],
)
def test_bad_debates_end_in_one_line_before_a_model_is_loaded(
    records, message, tmp_path, checkpoint, monkeypatch, capsys
) -> None:
    written(tmp_path / "my.jsonl", records)
    monkeypatch.setattr(sk, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stopped:
        main(command(tmp_path, checkpoint))
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("python -m analysis agents: ") and message in shown and "\n" not in shown
    assert not (tmp_path / "mine").exists()


def test_a_missing_checkpoint_adapter_or_option_is_refused_in_one_line(tmp_path, checkpoint, capsys) -> None:
    written(tmp_path / "my.jsonl", untagged())
    for more in (
        ["--checkpoint", str(tmp_path / "none")],
        ["--adapter", str(tmp_path / "none")],
        ["--set", "grid.x=1"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command(tmp_path, checkpoint, *more))
        assert stopped.value.code == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("python -m analysis agents: expected ")
    with pytest.raises(SystemExit) as stopped:
        main(["agents", "--checkpoint", "x", "--out", str(tmp_path / "mine")])
    assert stopped.value.code == 2 and "expected --traces FILE with --checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cast", "diverse"], "expected --base MODEL with --cast"),
        (["--set", "grid.layers=[4]"], "expected grid.layers as a list of layers from 0 to 3; got (4,)"),
        (["--set", 'grid.positions=["foo"]'], "expected positions among ['first', 'last', 'mean', 'tag']"),
        (["--set", "grid.positions=[]"], "expected positions among"),
        (["--set", 'grid.extents=["foo"]'], "expected positions among ('generated', 'from_last_prompt_token'"),
        (["--set", "grid.extents=[]"], "expected extents; got none"),
        (["--set", 'grid.sources=["foo"]'], "expected a list of 'asked', 'trace'"),
        (["--set", "grid.test=abc"], "expected a value of type int for 'grid.test'; got 'abc'"),
        (["--set", "protocol.controls=0"], "expected protocol.controls as an integer of at least 1; got 0"),
        (["--set", "grid.coefficients=[]"], "expected grid.coefficients as a list of numbers above 0; got []"),
        (["--set", "grid.max_new_tokens=900"], "fit the checkpoint's context of 1024"),
        (["--set", "protocol.rouge_tokenizer=words"], "expected protocol.rouge_tokenizer among"),
        (["--prompt", "Why?"], "expected a prompt with {question}, or chat, or text; got 'Why?'"),
        (["--prompt", "text"], "expected text before the first tag of every debate"),
    ],
)
def test_a_setting_that_would_fail_late_is_refused_before_a_model_is_loaded(
    more, message, tmp_path, checkpoint, monkeypatch, capsys
) -> None:
    written(tmp_path / "my.jsonl", untagged())
    monkeypatch.setattr(sk, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stopped:
        main(command(tmp_path, checkpoint, *more))
    shown = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in shown and "\n" not in shown


def test_a_base_of_another_width_or_without_a_chat_template_is_refused_before_it_is_loaded(
    tmp_path, checkpoint, monkeypatch, capsys
) -> None:
    written(tmp_path / "my.jsonl", untagged())
    monkeypatch.setattr(sk, "load", lambda *_, **__: pytest.fail("loaded"))
    other, bare = tmp_path / "other", tmp_path / "bare"
    tiny_model("gpt2").save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    tiny_model("llama", context=1024).save_pretrained(bare)
    tiny_tokenizer(template=False).save_pretrained(bare)
    for base, message in ((other, "expected checkpoints of the same size"), (bare, "with a chat template")):
        with pytest.raises(SystemExit):
            main(command(tmp_path, checkpoint, "--base", str(base), "--cast", "diverse"))
        assert message in capsys.readouterr().err


def test_a_cast_has_as_many_agents_as_the_debates(tmp_path, checkpoint, capsys) -> None:
    four = [{"question": f"{n}+0", "rounds": [[f"{agent} {n}" for agent in "abcd"]]} for n in range(60)]
    written(tmp_path / "my.jsonl", four)
    main(command(tmp_path, checkpoint, "--base", str(checkpoint), "--cast", "diverse", "--dry-run"))
    assert "4 agents" in capsys.readouterr().err


def test_options_reach_the_plan_and_the_configuration(tmp_path, checkpoint, capsys) -> None:
    skipped = {"question": "q", "rounds": [["a", "", "c"]]}
    written(tmp_path / "my.jsonl", [*untagged(), skipped])
    main(command(tmp_path, checkpoint, "--dry-run", "--skip-incomplete", "--prompt", "chat", "--dtype", "bfloat16"))
    shown = capsys.readouterr().err
    assert "Left out: 1 debates" in shown and "First prompt: '<|user|>" in shown
    usual, given = (
        inputs_of_files({"checkpoint": checkpoint}, tmp_path / "my.jsonl", True, **options)
        for options in ({}, {"prompt": "chat", "load_options": {"dtype": "bfloat16"}})
    )
    assert usual.reading() == {} and given.reading() == {"prompt": "chat", "load": {"dtype": "bfloat16"}}
    assert str(given.load("checkpoint")[0].dtype) == "torch.bfloat16"
    with pytest.raises(SystemExit):
        main(command(tmp_path, checkpoint, "--dry-run"))
    assert "Pass --skip-incomplete" in capsys.readouterr().err


def test_a_folder_of_another_configuration_keeps_its_debates(tmp_path, checkpoint, capsys) -> None:
    written(tmp_path / "my.jsonl", untagged())
    out = tmp_path / "mine"
    out.mkdir()
    (out / "config.json").write_text('{"grid": "another"}')
    (out / "traces.jsonl").write_text("kept")
    with pytest.raises(SystemExit):
        main(command(tmp_path, checkpoint))
    assert "expected the configuration that" in capsys.readouterr().err
    assert (out / "traces.jsonl").read_text() == "kept" and not (out / "stages").exists()


def test_letters_that_rouge_does_not_see_choose_another_tokenizer_and_one_long_text_does_not_set_the_length(
    tmp_path, checkpoint
) -> None:
    records = [{**one, "rounds": [["\u0434\u0430 " + text for text in one["rounds"][0]]]} for one in untagged()]
    records[0]["rounds"][0][0] = "x" * 400
    inputs = inputs_of_files({"checkpoint": checkpoint}, written(tmp_path / "my.jsonl", records))
    sizes = sizes_of(inputs, 3)
    setting = planned(Analysis(), sizes)
    assert setting.grid.rouge_tokenizer == setting.protocol.rouge_tokenizer == "unicode"
    assert sizes.continuation < 50 < 400 == max(sizes.lengths) and setting.grid.max_new_tokens == sizes.continuation
    short = replace(Analysis(), grid=replace(Analysis().grid, max_new_tokens=64))
    assert planned(short, sizes).grid.max_new_tokens == 64
    assert dropped_letters(["abc"]) == 0 and names_of(inputs) == {}


def test_an_adapter_alone_is_planned_with_the_base_that_it_names(tmp_path, checkpoint, capsys) -> None:
    adapter = tmp_path / "adapter"
    get_peft_model(tiny_model("llama", context=1024), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(checkpoint)}))
    written(tmp_path / "my.jsonl", untagged())
    main(command(tmp_path, adapter, "--dry-run"))
    assert "4 layers, tried: 1, 2." in capsys.readouterr().err


def test_the_debates_of_each_split_are_ordered_by_the_hash_of_their_question(tmp_path, checkpoint) -> None:
    paths = [written(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", untagged()), ("b", untagged()[::-1]))]
    first, second = (inputs_of_files({"checkpoint": checkpoint}, path) for path in paths)
    assert first.train == second.train and first.test == second.test
    assert [trace.question for trace in first.test] != sorted(trace.question for trace in first.test)


def test_sentences_warn_of_few_questions_and_of_strengths_that_cannot_show_an_effect() -> None:
    ends = {"stage": "checkpoint", "low": 0.1, "high": 0.3, "n": 8}
    gains = [{**ends, "score": "rouge_l", "identity": False, "agent": 1, "over": over, "gain": 0.2}
             for over in ("coefficient 0", "random")]  # fmt: skip
    probes = {"layer": "nested", "labels": "true", "position": "last", "source": "trace", "majority": 0.5}
    probes |= {"stage": "checkpoint", "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 1.0, "n_groups": 36}
    protocol = [{**ends, "score": "rouge_l", "grid": "controls", "context": "tagged", "measure": measure, "value": 0.2}
                for measure in ("area, own", "area over random")]  # fmt: skip
    doses = {"stage": "checkpoint", "grid": "controls", "strength": [0.0, 0.05], "relative_dose": [0.0, 0.05]}
    tables = {"gains": pd.DataFrame(gains), "separability": pd.DataFrame([probes])}
    tables |= {"protocol": pd.DataFrame(protocol), "protocol_doses": pd.DataFrame(doses)}
    probe, agent, area, weak = sentences(tables, "checkpoint", Analysis(), {"1": "Ann"})
    assert probe.endswith("the largest class has 0.50; n = 36 questions.")
    assert agent.startswith("Agent Ann,") and agent.endswith(
        "n = 8 questions. Fewer than 10 questions: the interval is not reliable."
    )
    assert "relative doses 0, 0.2, 0.5: the area" in area and weak.startswith(
        "The largest strength of the protocol is 5.0%"
    )


@pytest.mark.parametrize(
    "error",
    [
        ImportError("expected bitsandbytes"),
        NoResidualStream("expected blocks"),
        RunFolderBusy("expected a free folder"),
        ValueError("expected a number"),
        subprocess.CalledProcessError(1, "figures"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_analysis_is_one_line(error, tmp_path, checkpoint, monkeypatch, capsys) -> None:
    def failing(*_: object) -> None:
        raise error

    written(tmp_path / "my.jsonl", untagged())
    monkeypatch.setattr(own_debates, "analyse_debates", failing)
    with pytest.raises(SystemExit) as stopped:
        main(command(tmp_path, checkpoint))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("python -m analysis agents: expected ")


def test_sampled_layers_are_evenly_spaced_and_leave_out_the_ends() -> None:
    assert sampled_layers(32, 7) == (4, 8, 12, 16, 20, 24, 28)
    assert sampled_layers(4, 2) == (1, 2) and sampled_layers(2, 7) == (0, 1)
