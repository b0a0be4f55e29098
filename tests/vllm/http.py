"""A live server on SmolLM2: what it refuses, what it answers, our client, the doctor, and other clients.

Run by `python -m pytest tests/vllm/http.py` in the environment of vLLM. `REQUESTS=1000` sends that many random ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.doctor.served import examine_served
from steerkit.generation.engine import Row
from steerkit.generation.generate import decode
from steerkit.serving.client import Server, ServerError
from steerkit.text.prompt import encode_prompt
from tests.vllm.__main__ import OUT, prepare, publish
from tests.vllm.cases import PROMPTS, endless
from tests.vllm.live import Live, serving

OPTIONS = ["--sums", "2", "--name", "smol"] + [
    f"--engine={one}"
    for one in (
        "--dtype=float32",
        "--enforce-eager",
        "--max-model-len=512",
        "--block-size=32",
        "--num-gpu-blocks-override=100",  # requests are preempted where many are sent
    )
]
KEY = "a-key-of-this-test-only"
REQUESTS = int(os.environ.get("REQUESTS", "40"))


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any, sk.SteeringVector]:
    prepare()
    return (*sk.load(OUT / "model"), sk.SteeringVector.load(OUT / "vectors" / "mood.safetensors"))


@pytest.fixture(scope="module")
def live(real, tmp_path_factory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("served")
    real[2].save(folder / "mood.safetensors")
    sk.SteeringVector({3: torch.ones(7)}).save(folder / "narrow.safetensors")
    with serving(OUT / "model", folder, tmp_path_factory.mktemp("log") / "server.log", OPTIONS) as one:
        yield one


def post(live: Live, path: str, body: Any, key: str | None = None, method: str = "POST") -> tuple[int, Any]:
    """Status and JSON (or text) of an answer."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(live.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def asked(specification: Any, **more: Any) -> dict[str, Any]:
    text = specification if isinstance(specification, str) else json.dumps(specification)
    body = {"model": "smol", "prompt": "The sea", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return {**body, "return_token_ids": True, "vllm_xargs": {"steerkit": text}, **more}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": (asked({"vector": "nope"}), "expected a served vector"),
    "path as a name": (asked({"vector": "../mood", "layer": 16}), "expected a served vector"),
    "another width": (asked({"vector": "narrow"}), "width 7"),
    "layer outside": (asked({"vector": "mood", "layer": 30}), "'layer'"),
    "no layer": (asked({"vector": "mood"}), "'layer'"),
    "NaN": (asked('{"vector": "mood", "layer": 16, "coefficient": NaN}'), "expected JSON"),
    "a number beyond float64": (
        asked('{"vector": "mood", "layer": 16, "coefficient": 1%s}' % (400 * "0")),
        "finite number",
    ),
    "a key twice": (asked('{"vector": "mood", "layer": 16, "layer": 14}'), "a key twice"),
    "nested without end": (asked(20_000 * "["), "expected JSON"),
    "overflow from layer to layer": (
        asked({"vector": "mood", "layer": "all", "operation": "ablate", "coefficient": -1000}),
        "could overflow",
    ),
    "text as a number": (asked({"vector": "mood", "layer": 16, "coefficient": "2"}), "finite number"),
    "unknown field": (asked({"vector": "mood", "layer": 16, "strength": 2}), "strength"),
    "unknown position": (asked({"vector": "mood", "layer": 16, "positions": "some"}), "expected positions"),
    "empty list": (asked([]), "empty list"),
    "no JSON": (asked("{"), "expected JSON"),
    "misspelt key": (asked("", vllm_xargs={"steering": '{"vector": "mood"}'}), "steering"),
    "beams": (asked({"vector": "mood", "layer": 16}, use_beam_search=True, n=2), "beam search"),
    "beams, unknown name": (asked({"vector": "nope"}, use_beam_search=True, n=2), "beam search"),
    "too many": (asked([{"vector": "mood", "layer": 16}] * 5), "at most 4"),
    "reading without a key": (asked("", vllm_xargs={"steerkit_read": "{}"}), "expected an object"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_with_the_reason_and_never_answered_unsteered(live, name, stream) -> None:
    body, message = BAD[name]
    for path, more in (
        ("/v1/completions", {}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ):
        sent = {key: value for key, value in {**body, **more}.items() if not (more and key == "prompt")}
        status, answer = post(live, path, {**sent, "stream": stream})
        assert status == 400, answer
        assert message in answer["error"]["message"]
    assert live.alive


def test_vectors_are_listed_with_the_reason_why_one_cannot_be_served(live, real) -> None:
    listing = Server(live.url).listing()
    errors = {one["name"]: one["error"] for one in listing["vectors"]}
    assert errors["mood"] == ""
    assert "width 7" in errors["narrow"]
    assert listing["model"]["fingerprint"] == real[2].meta["model_fingerprint"]
    assert listing["model"]["dtype"] == "float32"


def test_vectors_are_added_and_removed_while_requests_run(live, real) -> None:
    client, vector = Server(live.url), real[2]
    plain, running = post(live, "/v1/completions", asked({"vector": "mood", "layer": 16, "coefficient": 0}))[1], []

    def run() -> None:
        running.append(post(live, "/v1/completions", asked({"vector": "mood", "layer": 16}, max_tokens=64)))

    thread = threading.Thread(target=run)
    thread.start()
    client.put("added", vector.at(16) * 2.0)
    status, steered = post(live, "/v1/completions", asked({"vector": "added", "coefficient": 2}))
    client.delete("added")
    thread.join()
    assert status == 200
    assert steered["choices"][0]["token_ids"] != plain["choices"][0]["token_ids"]
    assert running[0][0] == 200
    assert post(live, "/v1/completions", asked({"vector": "added"}))[0] == 400
    assert post(live, "/v1/steering/vectors/added", b"", method="DELETE")[0] == 404
    for name, data, message in (
        ("wrong", b"no file", "could not be read"),
        ("narrow2", (live.vectors / "narrow.safetensors").read_bytes(), "width 7"),
        ("..%2Fescape", b"", ""),
    ):
        status, answer = post(live, f"/v1/steering/vectors/{name}", data, method="PUT")
        assert status in (400, 404)
        assert message in str(answer)
    names = {one["name"] for one in client.listing()["vectors"]}
    assert names == {"mood", "narrow"}


@pytest.mark.parametrize("field", ["steering", "vector", "extra_body", "vllm_xarg"])
def test_a_steering_beside_its_field_is_refused_and_other_unknown_fields_are_left_to_vllm(live, field) -> None:
    status, answer = post(live, "/v1/completions", asked("", vllm_xargs={}, **{field: {"vector": "mood"}}))
    assert status == 400 and "vllm_xargs" in str(answer)
    status, answer = post(live, "/v1/completions", asked("", vllm_xargs={}, colour="red"))
    plain = post(live, "/v1/completions", asked("", vllm_xargs={}))[1]
    assert (status, answer["choices"][0]["token_ids"]) == (200, plain["choices"][0]["token_ids"])


KINDS = ("plain", "greedy", "sampled", "n", "stream", "beams", "misspelt", "wrong", "top")


def random_request(rng: random.Random) -> dict[str, Any]:
    """A body, valid or not."""
    one: dict[str, Any] = {"vector": "mood", "layer": rng.choice([3, 14, 16, 29]), "coefficient": rng.uniform(-3, 3)}
    one["positions"] = rng.choice(["generated", "from_last_prompt_token", "prompt", "all"]) + rng.choice(["", "", ":3"])
    one["operation"] = rng.choice(["add", "add", "ablate"])
    several = [one] if rng.random() < 0.7 else [one, {**one, "layer": rng.choice([10, 20]), "coefficient": 1}]
    body = asked(several, prompt=rng.choice(PROMPTS), max_tokens=rng.randint(1, 24))
    kind = rng.choice(
        ["plain", "greedy", "greedy", "greedy", "sampled", "n", "stream", "beams", "misspelt", "wrong", "top"]
    )
    if kind == "plain":
        del body["vllm_xargs"]
    elif kind == "sampled":
        body |= {"temperature": 0.8, "seed": rng.randint(0, 99), "logprobs": 0}
    elif kind == "n":
        body |= {"n": 2, "temperature": 0.8, "seed": rng.randint(0, 99), "logprobs": 0}
    elif kind == "beams":
        body |= {"use_beam_search": True, "n": 2}
    elif kind == "misspelt":
        body["vllm_xargs"] = {rng.choice(["steer_kit", "steering", "SteerKit"]): body["vllm_xargs"]["steerkit"]}
    elif kind == "wrong":
        field = rng.choice(["vector", "layer", "coefficient", "positions", "operation", "strength"])
        several[0][field] = rng.choice(["nope", True if field == "coefficient" else -1, None, [], {}])
        body["vllm_xargs"]["steerkit"] = json.dumps(several)
    elif kind == "top":
        body[rng.choice(["steering", "vector", "extra_body"])] = {"vector": "nope"}
    return {**body, "kind": kind, "stream": kind == "stream"}


def streamed_ids(text: str) -> list[int]:
    """The token ids of a stream of events."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return [token for event in events for choice in event["choices"] for token in choice.get("token_ids") or ()]


def test_random_requests_are_answered_as_our_engine_does_or_refused(live, real) -> None:
    """Sent many at a time: every greedy answer has our tokens, every sampled one our log-probabilities."""
    model, tokenizer, vector = real
    rng = random.Random(REQUESTS)
    bodies = [random_request(rng) for _ in range(REQUESTS)]
    sent = [{key: value for key, value in body.items() if key != "kind"} for body in bodies]
    with ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(lambda body: post(live, "/v1/completions", body), sent))
    assert live.alive
    assert Server(live.url).call("counts", None)[0]["steered_tokens"] > 0
    seen: Counter[tuple[str, int]] = Counter()
    greedy, sampled = [], []
    for body, (status, answer) in zip(bodies, answers, strict=True):
        seen[body["kind"], status] += 1
        if body["kind"] in ("beams", "misspelt", "wrong", "top"):
            assert status == 400, (body, answer)
            continue
        assert status == 200, (body, answer)
        ids = [streamed_ids(answer)] if body["stream"] else [choice["token_ids"] for choice in answer["choices"]]
        row = Row(encode_prompt(tokenizer, body["prompt"]), steerings_of(body, vector))
        if body["temperature"] == 0:
            greedy.append((row, ids[0], body["max_tokens"]))
        else:
            given = [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]]
            sampled += [(row, one, log_probs) for one, log_probs in zip(ids, given, strict=True)]
    with endless(model, tokenizer) as unending:
        longest = max(count for *_, count in greedy)
        done = dict(
            p for batch in decode(model, unending, [r for r, *_ in greedy], [], max_new_tokens=longest) for p in batch
        )
    different = [i for i, (_, ids, n) in enumerate(greedy) if list(done[i].ids[:n]) != ids]
    print(f"\n{len(greedy)} greedy, {len(different)} differ; {len(sampled)} sampled; {dict(seen)}")
    assert len(different) <= 0.01 * len(greedy)
    largest = 0.0
    for row, ids, given in sampled:
        own = log_probabilities(model, row, ids)
        torch.testing.assert_close(own, torch.tensor(given), rtol=2e-3, atol=2e-3)
        largest = max(largest, float((own - torch.tensor(given)).abs().max()))
    if REQUESTS >= 1000:
        kinds = {kind: {str(status): n for (k, status), n in sorted(seen.items()) if k == kind} for kind in KINDS}
        found = {"requests": REQUESTS, "greedy": len(greedy), "different": len(different), "sampled": len(sampled)}
        found["refused"] = sum(n for (_, status), n in seen.items() if status == 400)
        publish("requests", {**found, "largest_log_prob_difference": largest, "statuses": kinds})


def steerings_of(body: dict[str, Any], vector: sk.SteeringVector) -> tuple[sk.Steering, ...]:
    given = json.loads(body.get("vllm_xargs", {}).get("steerkit", "[]"))
    return tuple(
        sk.Steering(vector, one["coefficient"], one["positions"], one["operation"], layer=one["layer"]) for one in given
    )


def log_probabilities(model: Any, row: Row, ids: list[int]) -> torch.Tensor:
    """Those of a row's new tokens, by one plain forward."""
    start = len(row.prompt)
    with contextlib.ExitStack() as stack:
        for one in row.steerings:
            stack.enter_context(one.on(model, prompt_length=start))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*row.prompt, *ids]]), use_cache=False).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def test_the_openai_client_streams_and_gives_log_probabilities(live) -> None:
    import openai

    client = openai.OpenAI(base_url=live.url + "/v1", api_key="none")
    extra = {"vllm_xargs": {"steerkit": json.dumps({"vector": "mood", "layer": 16, "coefficient": 2})}}
    messages = [{"role": "user", "content": "How was your day?"}]
    options: dict[str, Any] = {"model": "smol", "messages": messages, "max_tokens": 12, "temperature": 0}
    plain = client.chat.completions.create(**options).choices[0].message.content
    steered = client.chat.completions.create(**options, extra_body=extra, logprobs=True).choices[0]
    parts = client.chat.completions.create(**options, extra_body=extra, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == steered.message.content != plain
    assert all(one.logprob <= 0 for one in steered.logprobs.content)
    with pytest.raises(openai.BadRequestError, match="expected a served vector"):
        client.chat.completions.create(**options, extra_body={"vllm_xargs": {"steerkit": '{"vector": "x"}'}})


def test_the_doctor_finds_nothing_wrong(live) -> None:
    findings = examine_served(live.url)
    print()
    for one in findings:
        print(f"{one.check}: {one.state}: {one.detail}")
    assert {one.state for one in findings} <= {"ok", "note"}
    assert [one.check for one in findings if one.state == "note"] == ["vector narrow"]
    assert "doctor-probe" not in {one["name"] for one in Server(live.url).listing()["vectors"]}


def test_a_server_killed_in_the_middle_of_a_sweep_loses_no_row(live, real, tmp_path) -> None:
    model, tokenizer, vector = real
    options: dict[str, Any] = {"coefficients": [-1, 1, 2], "layers": [14, 16], "max_new_tokens": 40}
    own = sk.sweep(model, tokenizer, vector, PROMPTS, **options)
    killed = threading.Event()

    def kill() -> None:
        rows = tmp_path / "run" / "rows.jsonl"
        while not (rows.exists() and rows.read_text().count("\n") >= 8):
            time.sleep(0.05)
        live.kill()
        killed.set()
        live.start(wait=False)

    thread = threading.Thread(target=kill)
    thread.start()
    engine = Server(live.url, concurrency=16)
    result = sk.sweep(None, tokenizer, vector, PROMPTS, **options, engine=engine, out=tmp_path / "run")
    thread.join()
    live.wait()
    assert killed.is_set()
    keys = [tuple(json.loads(line)["key"]) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 7 * len(PROMPTS)
    columns = ["vector", "layer", "coefficient", "prompt_id", "text"]
    pd.testing.assert_frame_equal(result.table[columns], own.table[columns])


CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
metadata:
  version: 1
"""
QUESTIONS = [
    {"question": f"The capital of {country} is", "choices": [f" {city}", " Atlantis"], "answer": 0}
    for country, city in (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"),
                          ("Russia", "Moscow"), ("Egypt", "Cairo"), ("Greece", "Athens"), ("Cuba", "Havana"))
]  # fmt: skip


def test_lm_evaluation_harness_scores_through_the_server_what_it_scores_here(live, real, tmp_path) -> None:
    harness = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from steerkit.lm_eval import SteeredLM
    from steerkit.serving.lm_eval import SteeredServer

    model, tokenizer, vector = real
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(file=tmp_path / "q.jsonl"))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def evaluate(one: Any) -> tuple[float, list[float]]:
        found = harness.simple_evaluate(
            model=one, tasks=["local_choice"], task_manager=tasks, bootstrap_iters=0, verbosity="ERROR"
        )
        samples = sorted(found["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
        numbers = [pair[0][0] if isinstance(pair[0], tuple) else pair[0] for s in samples for pair in s["resps"]]
        return found["results"]["local_choice"]["acc,none"], [float(n) for n in numbers]

    server = Server(live.url)
    plain = evaluate(SteeredServer(server, tokenizer))
    zero = evaluate(SteeredServer(server, tokenizer, {"vector": "mood", "layer": 16, "coefficient": 0}))
    spec = {"vector": "mood", "layer": 16, "coefficient": -8, "positions": "all"}
    strong = evaluate(SteeredServer(server, tokenizer, spec))
    ours = evaluate(SteeredLM(model, tokenizer, sk.Steering(vector, -8.0, "all", layer=16)))
    assert zero == plain
    assert strong[0] != plain[0]
    assert strong[1] == pytest.approx(ours[1], rel=1e-3, abs=1e-3)
    with pytest.raises(ServerError, match="expected a served vector"):
        SteeredServer(server, tokenizer, {"vector": "nope"})


def test_an_inspect_task_runs_at_any_steering(live, monkeypatch, tmp_path) -> None:
    inspect = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import get_model
    from inspect_ai.scorer import includes

    data = [Sample(input=f"Name the capital of {row['question'][15:-3]}.", target=row["choices"][0].strip())
            for row in QUESTIONS]  # fmt: skip
    task = inspect.Task(dataset=MemoryDataset(data), scorer=includes())

    def accuracy(**more: Any) -> float:
        model = get_model("steerkit/smol", base_url=live.url + "/v1", memoize=False, **more)
        (log,) = inspect.eval(task, model=model, log_dir=str(tmp_path), display="none", temperature=0, max_tokens=24)
        assert log.status == "success", log.error
        return float(log.results.scores[0].metrics["accuracy"].value)

    plain = accuracy()
    assert accuracy(vector="mood", layer=16, coefficient=0) == plain > 0.3
    assert accuracy(vector="mood", layer=16, coefficient=-12, positions="all") < plain
    with pytest.raises(ServerError, match="expected a served vector"):
        accuracy(vector="nope")


def test_a_key_guards_the_vectors_like_the_rest(real, tmp_path) -> None:
    (tmp_path / "vectors").mkdir()
    options = [*OPTIONS, "--api-key", KEY]
    with serving(OUT / "model", tmp_path / "vectors", tmp_path / "log", options) as live:
        for method, path in (("GET", "/v1/steering/vectors"), ("PUT", "/v1/steering/vectors/x"), ("GET", "/v1/models")):
            assert post(live, path, None if method == "GET" else b"x", method=method)[0] == 401
        assert post(live, "/v1/steering/vectors", None, key=KEY, method="GET")[0] == 200
        with pytest.raises(ServerError, match="401"):
            Server(live.url, patience_s=0)
        os.environ["STEERKIT_API_KEY"] = KEY
        try:
            assert Server(live.url).listing()["vectors"] == []
        finally:
            del os.environ["STEERKIT_API_KEY"]
        assert KEY not in (tmp_path / "log").read_text(errors="replace")


def test_a_server_without_the_plugin_is_refused_by_our_client(real, tmp_path) -> None:
    import subprocess
    import sys

    from tests.vllm.live import free_port
    from tests.vllm.modes import ENVIRONMENT

    port = free_port()
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(OUT / "model"),
        "--port",
        str(port),
    ]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT})
    live = Live(OUT / "model", tmp_path, tmp_path / "log", port=port, process=process)
    try:
        live.wait()
        with pytest.raises(ServerError, match="steerkit serve"):
            Server(live.url, patience_s=0)
        status, answer = post(
            live, "/v1/completions", {**asked({"vector": "mood", "layer": 16}), "model": str(OUT / "model")}
        )
        assert status == 400
        assert "started without" in answer["error"]["message"]
    finally:
        process.terminate()
        process.wait()
