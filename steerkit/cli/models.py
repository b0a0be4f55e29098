"""Commands about a checkpoint: `inspect` and `doctor`."""

from __future__ import annotations

import sys

from steerkit.cli.options import Checkpoint, Json, LoadOptions, load_model, with_load_options
from steerkit.show.terminal import facts, table


@with_load_options
def inspect(checkpoint: Checkpoint, loading: LoadOptions, as_json: Json = False) -> None:
    """Print what a checkpoint is and where it can be steered.

    Example: steerkit inspect HuggingFaceTB/SmolLM2-135M-Instruct
    """
    loading.check(checkpoint)
    from steerkit.models.identity import describe

    about = describe(*load_model(checkpoint, loading))
    versions = " ".join(f"{package} {version}" for package, version in about["versions"].items())
    facts(about, as_json, shown={**about, "versions": versions})


@with_load_options
def doctor(checkpoint: Checkpoint, loading: LoadOptions, as_json: Json = False) -> None:
    """Test on this checkpoint what steering relies on.

    The checkpoint may be a hub id, a folder, a GGUF file, or the address of a server that `steerkit serve` has started.
    The exit code is 1 if a check fails.

    Example: steerkit doctor HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from dataclasses import asdict

    if checkpoint.startswith(("http://", "https://")):
        from steerkit.doctor.served import examine_served

        findings = examine_served(checkpoint)
    else:
        loading.check(checkpoint)
        from steerkit.doctor.report import examine

        findings = examine(*load_model(checkpoint, loading))
    import pandas as pd

    table(f"doctor: {checkpoint}", pd.DataFrame([asdict(finding) for finding in findings]), as_json)
    failed = [finding.check for finding in findings if finding.state == "failed"]
    if not as_json:
        print(f"Failed checks: {', '.join(failed)}." if failed else "All checks passed.")
    if failed:
        sys.exit(1)
