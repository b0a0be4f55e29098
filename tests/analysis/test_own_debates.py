"""A file of debates and a checkpoint give vectors, tables, figures and a page; bad sizes end in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import steerkit as sk
from analysis.__main__ import main
from analysis.own_debates import sampled_layers
from steerkit.io.tables import read_table
from steerkit.text.traces import read_traces
from tests.tiny import tiny_model, tiny_tokenizer

SMALL = (
    "grid.coefficients=[1]", "grid.negative=[]", "grid.positions=[\"last\"]", "grid.extents=[\"generated\"]",
    "grid.validation=4", "grid.test=4", "grid.controls=2", "grid.max_new_tokens=6", "layers=2", "probed=12",
    "protocol.control_coefficients=[2]", "protocol.coefficients=[1,2]", "protocol.doses=[0.2]", "protocol.controls=2",
    "protocol.validation=2", "protocol.test=4", "protocol.max_new_tokens=6",
)  # fmt: skip


def untagged(count: int = 60) -> list[dict]:
    said = ("first {}", "so second {}", "third {} it is")
    return [
        {"question": f"{n}+0", "rounds": [[text.format(n) for text in said] for _ in "12"], "consensus": f"It is {n}"}
        for n in range(count)
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
    written(tmp_path / "my.jsonl", untagged())
    call = command(tmp_path, checkpoint, "--base", str(checkpoint), "--cast", "diverse")
    texts = counted(monkeypatch)
    main(call)
    (planned,) = re.findall(r"Texts in all: ([\d,]+),", capsys.readouterr().err)
    assert int(planned.replace(",", "")) == pytest.approx(sum(texts), rel=0.2)
    out = tmp_path / "mine"
    assert len(read_traces(out / "traces.jsonl")) == 60
    vector = sk.SteeringVector.load(out / "stages" / "checkpoint" / "agent-2.safetensors")
    assert len(vector.layers) == 4
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


def test_sampled_layers_are_evenly_spaced_and_leave_out_the_ends() -> None:
    assert sampled_layers(32, 7) == (4, 8, 12, 16, 20, 24, 28)
    assert sampled_layers(4, 2) == (1, 2) and sampled_layers(2, 7) == (0, 1)
