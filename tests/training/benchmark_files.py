"""Small files in the released formats of GSM8K, MMLU-Pro and BBH."""

from __future__ import annotations

import json
from pathlib import Path

from training.problems.benchmarks import BBH_TASKS


def write_benchmarks(folder: Path) -> Path:
    """Write the three benchmarks below a folder, and return the folder."""
    for name in ("gsm8k", "mmlu_pro", "bbh"):
        (folder / name).mkdir(parents=True)
    sums = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(120)]
    (folder / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    asked = [
        {"question_id": i, "question": f"{i}?", "options": ["x", "y"], "answer": "A", "answer_index": 0}
        | {"category": f"c{i % 3}"}
        for i in range(60)
    ]
    (folder / "mmlu_pro" / "test_sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for task, kind in BBH_TASKS.items():
        word = "valid" if task == "formal_fallacies" else "Yes"
        target, text = ("(A)", "q {}\n(A) x\n(B) y") if kind == "option" else (word, "q {}")
        rows = [{"input": text.format(i), "target": target} for i in range(25)]
        (folder / "bbh" / f"{task}.json").write_text(json.dumps({"examples": rows}))
    return folder
