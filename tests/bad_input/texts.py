"""Cases: files of pairs and traces."""

from __future__ import annotations

import json
from collections.abc import Iterator

from steerkit.io.json import read_json
from steerkit.text.pairs import read_pairs
from steerkit.text.tags import CONSENSUS, END, agent_tag, round_tag
from steerkit.text.traces import DebateTrace, Turn, read_traces
from steerkit.text.turn_contrasts import read_contrasts
from tests.bad_input.cases import LINE, MESSAGES, PAIR, Case, Files, row

# Pairs

KEYS = ("expected keys", "Rename, add or drop keys")
PAIRS: dict[str, tuple[bytes, str, str, str]] = {
    "is empty": (b"", "expected at least one pair", "it is empty", "Write one object per line"),
    "has blank lines only": (b"\n \n\n", "expected at least one pair", "it is empty", "Write one object per line"),
    "is binary": (bytes(range(256)) * 8, "expected a JSON object", "line 1; got b'", LINE),
    "is all zeros": (bytes(1000) + b"\n", "expected a JSON object", "line 1; got b'", LINE),
    "is in UTF-16": (PAIR.decode().encode("utf-16"), "expected a JSON object", "line 1; got b'", LINE),
    "is in Latin-1": (PAIR + '{"prompt": "é"}\n'.encode("latin-1"), "expected a JSON object", "line 2; got b'", LINE),
    "is cut off in its last line": (PAIR * 2 + PAIR[:30], "expected a JSON object", "line 3; got b'", LINE),
    "is one line of a megabyte": (b"x" * 2**20 + b"\n", "expected a JSON object", "line 1; got b'xxx", LINE),
    "is nested too deeply": (b"[" * 200_000 + b"\n", "expected a JSON object", "nested too deeply", LINE),
    "has a key twice": (b'{"prompt": "a", ' + PAIR[1:], "expected a JSON object", "duplicate key 'prompt'", LINE),
    "has a list for an object": (b"[1, 2]\n", "expected a JSON object", "got b'[1, 2]'", LINE),
    "has a list around the pairs": (b"[" + PAIR.strip() + b"]\n", "expected a JSON object", "got b'[{", LINE),
    "has a text for an object": (b'"pair"\n', "expected a JSON object", "got b'\"pair\"'", LINE),
    "has a number for an object": (PAIR + b"3\n", "expected a JSON object", "line 2; got b'3'", LINE),
    "has null for an object": (b"null\n", "expected a JSON object", "got b'null'", LINE),
    "lacks a key": (b'{"prompt": "p", "positive": "yes"}\n', KEYS[0], "got ['positive', 'prompt']", KEYS[1]),
    "has another key": (row(Negative="no"), KEYS[0], "'Negative'", KEYS[1]),
    "has nested pairs": (b'{"pairs": [' + PAIR.strip() + b"]}\n", KEYS[0], "got ['pairs']", KEYS[1]),
    "has a number as prompt": (row(prompt=3), MESSAGES[0], "got 3", MESSAGES[1]),
    "has null as prompt": (row(prompt=None), MESSAGES[0], "got None", MESSAGES[1]),
    "has one message as prompt": (row(prompt={"role": "user", "content": "a"}), MESSAGES[0], "got {", MESSAGES[1]),
    "has texts as messages": (row(prompt=["hi"]), MESSAGES[0], "got ['hi']", MESSAGES[1]),
    "has no messages": (row(prompt=[]), MESSAGES[0], "got []", MESSAGES[1]),
    "has a message without content": (row(prompt=[{"role": "user"}]), MESSAGES[0], "got [{'role'", MESSAGES[1]),
    "has a message of null": (row(prompt=[{"role": "user", "content": None}]), MESSAGES[0], "None}]", MESSAGES[1]),
    "has an empty positive": (row(positive=""), "non-empty string as the pair's positive", "got ''", "Write one"),
    "has a number as negative": (row(negative=3), "non-empty string as the pair's negative", "got 3", "Write one"),
    "has a list as negative": (row(negative=["no"]), "non-empty string as the pair's negative", "['no']", "Write one"),
}


def pairs_cases() -> Iterator[Case]:
    for name, (content, *says) in PAIRS.items():
        files = {"in.jsonl": content}
        yield Case(f"a pairs file that {name}", lambda f: read_pairs(f / "in.jsonl"), *says, files=files)
    for what, read in {"pairs": read_pairs, "traces": read_traces, "JSON": read_json}.items():
        says = "expected a file at", "there is none", "Check the path", FileNotFoundError
        yield Case(f"a file of {what} that is not there", lambda f, read=read: read(f / "in.json"), *says)
        says = "expected a file at", "got a folder", "Name a file in it", IsADirectoryError
        yield Case(
            f"a folder for a file of {what}", lambda f, read=read: read(f / "in.json"), *says, files={"in.json": None}
        )


# Traces

R1, R2 = round_tag(1), round_tag(2)
A1, A2, B1, B2 = agent_tag(1, 1), agent_tag(2, 1), agent_tag(1, 2), agent_tag(2, 2)
WHOLE, ONCE, NOBODY = "expected a trace from", "expected each agent once per round", "expected the agents"
MISSPELT = "expected tags exactly as"
MALFORMED = {  # what is wrong -> the text, and what was expected
    "no tag": ("hello", WHOLE),
    "nothing in it": ("", WHOLE),
    "no first round": (f"{A1}: x\n\n{END}", WHOLE),
    "no end": (f"{R1}\n\n{A1}: x", WHOLE),
    "its end twice": (f"{R1} {A1}: x {END} {END}", "expected <|endofdebate|> once"),
    "a round without agents": (f"{R1}\n\n{END}", NOBODY),
    "an agent twice": (f"{R1} {A1}: x {A1}: y {END}", ONCE),
    "an agent missing in round 2": (f"{R1} {A1}: x {A2}: y {R2} {B1}: z {END}", NOBODY),
    "a new agent in round 2": (f"{R1} {A1}: x {R2} {B1}: y {B2}: z {END}", NOBODY),
    "a revision in round 1": (f"{R1} {B1}: x {END}", ONCE),
    "a solution in round 2": (f"{R1} {A1}: x {R2} {A1}: y {END}", ONCE),
    "a round skipped": (f"{R1} {A1}: x {round_tag(3)} {B1}: y {END}", "expected <|Round 2 - Revision|> next"),
    "a round twice": (f"{R1} {A1}: x {R1} {A1}: y {END}", "expected <|Round 2 - Revision|> next"),
    "an agent after the consensus": (f"{R1} {A1}: x {CONSENSUS} c {A2}: y {END}", ONCE),
    "a round after the consensus": (f"{R1} {A1}: x {CONSENSUS} c {R2} {B1}: y {END}", "expected <|Round 2"),
    "its consensus twice": (f"{R1} {A1}: x {CONSENSUS} c {CONSENSUS} d {END}", "expected <|Consensus|> once"),
    "its consensus before the agents": (f"{R1} {CONSENSUS} c {END}", NOBODY),
    "a tag that is not closed": (f"{R1} <|Agent 1 Solution: x {END}", "expected the agents directly after"),
    "text before a round's first agent": (f"{R1} so: {A1}: x {END}", "expected the agents directly after"),
    "agents from 2 on": (f"{R1} {A2}: x {R2} {B2}: y {END}", ONCE),
    "a tag with blanks inside": (f"{R1} <| Agent 1 Solution |>: x {A2}: y {END}", MISSPELT),
    "a tag with a small letter": (f"{R1} {A1}: x {A2}: y {END}".replace("2 S", "2 s"), MISSPELT),
    "a tag that is cut off at its end": (f"{R1} {A1}: x {END[:-1]}", MISSPELT),
    "tags interleaved": (f"{R1} {A1}: x {R2} {A2}: y {B1}: z {END}", ONCE),
    "tags of full-width bars": (f"{R1} {A1}: x {END}".replace("|", "\uff5c"), MISSPELT),
    "tags in another case": (f"{R1} {A1}: x {END}".lower(), MISSPELT),
    "an agent 0": (f"{R1} <|Agent 0 Solution|>: x {END}", MISSPELT),
}
TRACE = f"{R1}\n\n{A1}: x\n\n{END}"


def trace_file(*records: object, name: str = "in.json") -> Files:
    return {name: json.dumps(list(records)).encode()}


def record(**changes: object) -> dict[str, object]:
    return {"question": "q", "debate_trace": TRACE, **changes}


def trace_cases() -> Iterator[Case]:
    for name, (text, expected) in MALFORMED.items():
        yield Case(f"a trace with {name}", lambda _, t=text: DebateTrace("q", t), expected, "; ", "Correct the tags")
    quotes = "Put it in quotes"
    records: dict[str, tuple[Files, str, str, str]] = {
        "is cut off": (
            {"in.json": b'[{"question": "q"'},
            "expected JSON in",
            "got something else",
            "Correct or delete",
        ),
        "has a key twice": (
            {"in.json": b'[{"question": 1, "question": 2}]'},
            "expected JSON",
            "duplicate key",
            "Correct",
        ),
        "holds one object": ({"in.json": b"{}"}, "expected a JSON list of objects", "got '{}'", "Put the records in ["),
        "holds numbers": ({"in.json": b"[1]"}, "expected a JSON list of objects", "got '[1]'", "Put the records in ["),
        "lacks the trace": (trace_file({"question": "q"}), "expected the keys", "got ['question']", "Add ["),
        "has null as trace": (trace_file(record(debate_trace=None)), "expected the text", "got None", quotes),
        "has a number as question": (trace_file(record(question=7)), "expected the question", "got 7", quotes),
        "has a list as answer": (trace_file(record(gold_answer=["14"])), "expected the gold", "got ['14']", quotes),
        "has no trace in record 2": (trace_file(record(), record(debate_trace="x")), "record 2: e", "; ", "Correct"),
    }
    for name, (files, *says) in records.items():
        yield Case(f"a file of traces that {name}", lambda f: read_traces(f / "in.json"), *says, files=files)
    torn = {"in.jsonl": json.dumps(record()).encode()[:-5]}
    yield Case(
        "traces, one a line, that are cut off", lambda f: read_traces(f / "in.jsonl"),
        "expected a JSON object", "line 1; got b'", LINE, files=torn,
    )  # fmt: skip
    tagged = [Turn(1, 1, f"x {A2}: y")]
    yield Case(
        "a turn with a tag in its text", lambda _: DebateTrace.of("q", tagged, None),
        "expected turns without tags", "got 'x <|Agent 2", "Take them out",
    )  # fmt: skip
    pair = {"turn_identifier": "t", "context": "c", "positive_agent_id": "1", "positive_response": "r"}
    twice = [{"negative_agent_id": "2", "negative_response": text} for text in "ab"]
    yield Case(
        "a steering pair without its negatives", lambda f: read_contrasts(f / "in.json"),
        "expected the released keys", "got ['context'", "`write_contrasts`", files=trace_file(pair),
    )  # fmt: skip
    yield Case(
        "a steering pair with a negative agent twice", lambda f: read_contrasts(f / "in.json"),
        "negative agent once", "got ['2'] for 2", "Take out", files=trace_file({**pair, "negative_pairs": twice}),
    )  # fmt: skip
