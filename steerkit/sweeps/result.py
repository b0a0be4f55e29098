"""The result of a sweep: one tidy table, its scores, curves, areas and gains with intervals. Imports no torch."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.io.tables import read_table, write_table
from steerkit.models.site_names import DEFAULT
from steerkit.scores.judge import Judge
from steerkit.scores.text import distinct_n, repeated_ngrams, rouge_l
from steerkit.stats.areas import curve_auc as area_under
from steerkit.stats.controls import against_controls, control_band, controls_needed
from steerkit.stats.items import slopes
from steerkit.stats.mean import accuracy_interval, is_binary, mean_interval
from steerkit.sweeps.columns import KEYS, RESERVED
from steerkit.sweeps.join import joined, key_columns, rows_in, scores_of
from steerkit.sweeps.layers import layers_of

PLACE = ("vector", "layer")
OF_CHOICES = ("probability", "log_prob")
"""Columns of scores that a sweep of choices has."""
FEW_PROMPTS = 10
MANY_MISSING = 0.1
"""The share of prompts without a score from which on a warning names it."""


class FewWarning(UserWarning):
    """There are too few prompts or controls for what is asked."""


@dataclass(frozen=True)
class SweepResult:
    """Generated texts and their scores, as one tidy table.

    The token ids (`prompt_ids`, `ids`) are what the model read and wrote; `text` is decoded once from `ids`. Scores
    under the sweep's own tokenizer read the ids, all others the text.

    Args:
        table: one row per vector, layer, coefficient, prompt and sample, with the columns that `sweep` returns.
        meta: provenance: model, weights, settings, versions.
    """

    table: pd.DataFrame
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [column for column in (*KEYS, "text", "group") if column not in self.table]
        if missing:
            raise ValueError(
                f"expected the columns of a sweep; got {list(self.table)[:12]}. Add {missing}, or load another table."
            )
        if self.table["group"].isna().any():
            raise ValueError(
                f"expected a group for each row; {int(self.table['group'].isna().sum())} have none. Fill in the "
                "column, for example with prompt_id."
            )

    def __repr__(self) -> str:
        names = ("vector", "layer", "coefficient")
        counts = [f"{self.table[column].nunique()} {column}s" for column in names]
        prompts, groups = (self.table[column].nunique() for column in ("prompt_id", "group"))
        grouped = "" if groups == prompts else f" in {groups} groups"
        return f"SweepResult({len(self.table)} rows, {', '.join(counts)}, {prompts} prompts{grouped})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.table.head().to_html(max_cols=12)}"

    @property
    def axis(self) -> str:
        """The column of the steering's strength: `dose` where the sweep was over doses, else `coefficient`.

        One dose is another coefficient for each vector and layer. Curves, areas and gains are over this column.
        """
        return "dose" if "dose" in self.table else "coefficient"

    def counts(self) -> dict[str, int]:
        """Texts that were generated (or choices scored), and rows: one at coefficient 0 is listed under each vector."""
        plain = self.table["coefficient"] == 0
        own = self.table[plain].drop_duplicates(key_columns(self.table)[-2:])
        computed, rows = int((~plain).sum()) + len(own), len(plain)
        if "choice" in self.table:
            return {"choices_scored": computed, "unsteered_choices": len(own), "rows": rows}
        return {"texts_generated": computed, "unsteered_texts": len(own), "rows": rows}

    @classmethod
    def load(cls, path: str | Path) -> SweepResult:
        """Read a finished sweep: its folder, or its table file."""
        path = Path(path)
        file = path / "table.parquet" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"expected a finished sweep at {file}; there is none. If only rows.jsonl exists, "
                "repeat the sweep to resume it."
            )
        table, meta = read_table(file)
        if "stream_norms" in meta:
            meta["stream_norms"] = _with_layers(meta["stream_norms"])
        return cls(table, meta)

    @classmethod
    def merge(cls, results: Sequence[SweepResult]) -> SweepResult:
        """Several sweeps of one model, with different rows, as one result.

        To add coefficients, vectors or prompts to a sweep, sweep into its folder instead (`sk.sweep(..., out=)`).

        Args:
            results: at least one sweep. In the merged provenance a setting in which they may differ is a list, one
                value per sweep. Vectors, judges and norms of the stream are those of all; the counts of a judge are
                added, so that a text in two sweeps counts twice. Probabilities of choices are among the choices of all.

        Raises:
            ValueError: no sweep; sweeps of different models; rows that do not belong into one mean: other settings,
                one name of two vectors, one prompt id of two prompts, other positions or operations of a vector and
                its controls, doses and coefficients, doses of other norms of the stream, one column of two judges; or
                a row (vector, layer, coefficient or dose, prompt, sample or choice) that occurs twice.

        Example:
            >>> both = SweepResult.merge([SweepResult.load("runs/layer-14"), SweepResult.load("runs/layer-16")])
        """
        return cls(*joined([one.table for one in results], [one.meta for one in results]))

    def where(self, keep: Sequence[bool] | np.ndarray | pd.Series) -> SweepResult:
        """The rows for which `keep`, one boolean per row, is true.

        Example:
            >>> matching = result.where(result.table["choice"] == result.table["matching"])
        """
        kept = np.asarray(keep)
        if kept.dtype != bool or kept.shape != (len(self.table),):
            got = f"{kept.dtype} of shape {kept.shape}"
            raise ValueError(f"expected {len(self.table)} booleans, one per row; got {got}. Compare a column of table.")
        return replace(self, table=self.table[kept].reset_index(drop=True))

    def with_scores_of(self, path: str | Path) -> SweepResult:
        """The same rows with the scores of another table, such as one from before the sweep has grown.

        A row has the scores of the row with the same key, token ids and text. Rows that were added since have NaN, and
        so have those of a vector that has been replaced by another one of its name. Unchanged if that file is missing
        or has none of these rows.
        """
        if not Path(path).is_file():
            return self
        scored = SweepResult.load(path)
        scores = scores_of(self.table, scored.table, self._others(scored))
        judges = {column: about for column, about in scored.meta.get("judges", {}).items() if column in scores}
        meta = {**self.meta, "judges": {**judges, **self.meta.get("judges", {})}} if judges else self.meta
        return replace(self, table=self.table.assign(**scores), meta=meta)

    def added_since(self, path: str | Path) -> np.ndarray:
        """For each row, whether another table, such as one from before the sweep has grown, lacks it.

        A row of a vector that has been replaced by another one of its name counts as added.
        """
        scored = SweepResult.load(path)
        return rows_in(scored.table, self.table, self._others(scored)) < 0

    def _others(self, earlier: SweepResult) -> list[str]:
        """The names of vectors that were other ones in an earlier sweep."""
        was, now = (one.meta.get("vectors") or {} for one in (earlier, self))
        return [name for name in now if name in was and now[name] != was[name]]

    def save(self, path: str | Path) -> None:
        """Write the table (`.parquet` or `.csv`) and its `.meta.json`."""
        write_table(path, self.table, self.meta)

    def score(
        self,
        name: str | Callable[[pd.Series], float] | Judge,
        *,
        column: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        vectors: Any = None,
        when: Any = None,
    ) -> SweepResult:
        """The same result with one more score, as a column of its table.

        Args:
            name: `"rouge_l"` (F1 against `reference`, rouge-score's tokenizer, which sees `[a-z0-9]` only),
                `"rouge_l_unicode"` (words of any script), `"rouge_l_symbols"` (one that keeps
                `//`, `=` and `-`), `"distance"` (1 - rouge_l_symbols against the same prompt's text at coefficient 0),
                `"distinct_2"`, `"repeated_4grams"`, `"perplexity"` (under the unsteered `model`, end token included;
                lower is more fluent), `"kl"` (KL(steered || unsteered) per token on the unsteered text; needs the
                sweep's `vectors`), a function of a row, or a judge (`sk.judge`). A row without a text (it overflowed)
                has the score NaN.
            column: its name; default the score's, and `judge` for a judge. `meta["judges"]` holds under this name what
                the judge was, the number of distinct texts and how many answers were not a score.
            when: for `"kl"` of a sweep with a condition, that condition.
            model: for `"perplexity"` any model; for `"kl"` the sweep's own. A model with the sweep's tokenizer reads
                the generated token ids. One with another tokenizer reads the text, and a warning says so.

        Raises:
            TypeError: a function that returns no number for a row.
            ValueError: an unknown score, what it needs is not there, or for `"kl"` a model that is not the sweep's.
            JudgeError: a judge's server gave no answer for some texts; the message names their rows, and the answers
                for all others are kept.
        """
        if isinstance(name, Judge):
            return self._judged(name, column or "judge")
        if callable(name):
            rows = [row for _, row in self.table.iterrows()]
            values = [_number(name, row) if isinstance(row["text"], str) else np.nan for row in rows]
            return self._with(column or str(getattr(name, "__name__", "score")), np.array(values, float))
        if name in ("perplexity", "kl"):
            if model is None or tokenizer is None or (name == "kl" and vectors is None):
                needed = "model= and tokenizer=" if name == "perplexity" else "model=, tokenizer= and vectors="
                raise ValueError(
                    f"expected {needed} for the score {name!r}; one is None. Pass them (on the command line: "
                    "--checkpoint)."
                )
            return self._with(column or name, self._by_model(name, model, tokenizer, vectors, when))
        if name not in PURE:
            known = [*PURE, "perplexity", "kl"]
            raise ValueError(f"expected a score among {known}, or a function of a row; got {name!r}. Choose one.")
        return self._with(column or name, PURE[name](self.table))

    def gains(self, score: str) -> pd.DataFrame:
        """Each vector's gains over coefficient 0, and over each kind of its controls.

        As `gain`, a row per vector, layer and coefficient, with the column `over`: `coefficient 0`, or the role of the
        controls (`random`, `matched`, `shuffled`, `other`). Random and matched directions have no rows of their own.
        """
        roles = self.roles()
        shown = [name for name, (role, _) in roles.items() if role not in ("random", "matched")]
        found = [self.gain(score, vectors=shown or list(roles)).assign(over="coefficient 0")]
        for vector in shown:
            for role in dict.fromkeys(role for role, _ in roles.values() if role != "vector"):
                if over := self.controls_of(vector, role):
                    found.append(self.gain(score, vectors=[vector], over=over).assign(over=role))
        return pd.concat(found, ignore_index=True)

    def roles(self) -> dict[str, tuple[str, str | None]]:
        """For each vector: its role, and the vector that it is a control of (None for all)."""
        if "role" not in self.table:
            return dict.fromkeys(self.table["vector"].unique(), ("vector", None))
        columns = self.table[["vector", "role", "control_of"]].drop_duplicates()
        return {
            name: (role, of if isinstance(of, str) else None)
            for name, role, of in columns.itertuples(index=False, name=None)
        }

    def controls_of(self, vector: str, role: str) -> list[str]:
        """The names of a vector's controls of one role; none for a vector that has this role itself."""
        roles = self.roles()
        mine, of_mine = roles[vector]
        if mine == role:
            return []
        wanted = (vector, of_mine, None) if mine != "vector" else (vector, None)
        return [name for name, (kind, of) in roles.items() if kind == role and of in wanted]

    def _with(self, column: str, values: np.ndarray) -> SweepResult:
        if column in RESERVED or column in ("group", "prompt", "reference"):
            raise ValueError(f"expected a name for the score that no column of a sweep has; got {column!r}. Rename it.")
        return replace(self, table=self.table.assign(**{column: values}))

    def _judged(self, judge: Judge, column: str) -> SweepResult:
        table = self.table
        texts = [text if isinstance(text, str) else None for text in table["text"]]
        prompts = table["prompt"].tolist() if "prompt" in table else None
        keys = table[key_columns(table)].to_dict("records")
        names = [f"row {n} ({', '.join(f'{k}={v!r}' for k, v in key.items())})" for n, key in enumerate(keys)]
        scored = self._with(column, judge.scores(texts, prompts, names))
        pairs = scored.table[["prompt", "text"] if judge.reads_prompts else ["text"]]
        once = scored.table[~pairs.duplicated() & pairs["text"].notna()]
        about = {**judge.about(), "n_texts": len(once), "n_unread": int(once[column].isna().sum())}
        return replace(scored, meta={**self.meta, "judges": {**self.meta.get("judges", {}), column: about}})

    def _by_model(self, name: str, model: Any, tokenizer: Any, vectors: Any, when: Any) -> np.ndarray:
        from steerkit.scores.fluency import kl, perplexity
        from steerkit.steering.steering import Steering

        table = self.table
        prompts, texts = self._scored(name, tokenizer)
        if name == "perplexity":
            keys = list(zip((prompt.ids for prompt in prompts), texts, strict=True))
            distinct = dict(zip(keys, prompts, strict=True))
            scores = perplexity(model, tokenizer, list(distinct.values()), [text for _, text in distinct])
            score_of = dict(zip(distinct, scores, strict=True))
            return np.array([score_of[key] for key in keys])
        check_swept_model(self.meta, model)
        named = dict(vectors) if isinstance(vectors, Mapping) else {"vector": vectors}
        known = self.meta.get("vectors", {})
        if missing := sorted(set(table["vector"]) - set(named)):
            raise ValueError(f"expected the sweep's vectors by name; got {list(named)}. Add {missing[:5]}.")
        if other := [n for n in table["vector"].unique() if n in known and named[n].content() != known[n]]:
            raise ValueError(
                f"expected the vectors that the sweep was run with; got others as {other[:5]}. Load those files."
            )
        swept = sorted(set(table["when"])) if "when" in table else []
        if swept != ([] if when is None else [str(when)]):
            raise ValueError(f"expected the condition of the sweep, {swept or None}; got {when}. Pass it as when=.")
        steerings: dict[tuple[Any, ...], Steering] = {}
        columns = ("vector", "layer", "coefficient", "positions", "operation", "site")
        told = table if "site" in table else table.assign(site=DEFAULT)
        settings: list[tuple[Any, ...]] = list(zip(*(told[column] for column in columns), strict=True))
        for key in dict.fromkeys(settings):
            vector, layer, coefficient, positions, operation, site = key
            how = {"foreign": True, "layer": layers_of(layer), "site": site, "when": when}
            steerings[key] = Steering(named[vector], float(coefficient), positions, operation, **how)
        unsteered = _unsteered(table, texts)
        return kl(model, tokenizer, prompts, unsteered, [steerings[key] for key in settings])

    def _scored(self, name: str, tokenizer: Any) -> tuple[list[Any], list[Any]]:
        """The prompts and continuations that a model with this tokenizer reads: token ids, or texts with a warning.

        Raises:
            ValueError: a table without prompts; for kl, one without token ids or another tokenizer.
        """
        from steerkit.models.identity import tokenizer_sha256
        from steerkit.text.prompt import Prompt, render

        if "prompt" not in self.table:
            raise ValueError(f"expected a column 'prompt'; got {list(self.table)[:12]}. Load a sweep's own table.")
        own = self.meta.get("tokenizer_sha256")
        if "ids" in self.table and own in (None, tokenizer_sha256(tokenizer)):
            prompt_ids, new_ids = ids_of(self.table)
            prompts = dict(zip(prompt_ids, self.table["prompt"], strict=True))
            made = {ids: Prompt(ids, text) for ids, text in prompts.items()}
            has_text = [isinstance(text, str) for text in self.table["text"]]
            read = [ids if ok else () for ids, ok in zip(new_ids, has_text, strict=True)]
            return [made[ids] for ids in prompt_ids], read
        if name == "kl":
            raise ValueError(
                "expected the sweep's own model and tokenizer for kl; got another tokenizer. Load the sweep's "
                "checkpoint."
            )
        warnings.warn(
            f"the tokenizer is not the sweep's: {name} is of the decoded texts, encoded again, without end tokens.",
            UserWarning,
            stacklevel=4,
        )
        rendered = {text: render(tokenizer, text) for text in self.table["prompt"].unique()}
        texts = [text if isinstance(text, str) else "" for text in self.table["text"]]
        return [rendered[text] for text in self.table["prompt"]], texts

    def curve(self, score: str, by: Sequence[str] = PLACE, seed: int = 0) -> pd.DataFrame:
        """Mean of a score per coefficient with a 95 % interval over groups (prompts, not rows); see `mean_interval`.

        The samples of a prompt are averaged first, so that each prompt weighs the same. Columns: `by`, coefficient,
        mean, low, high, n (groups), n_missing (rows without a score), relative_dose. A sweep over doses has a row per
        dose, with the column dose; coefficient is then its mean. The mean of a score that is 0 or 1 in all rows of
        `by` is a share, whose interval is that of `accuracy_interval`.
        """
        self._check(score, by)
        rows = []
        shares = {key: is_binary(part[score]) for key, part in self._parts(score, list(by))} if by else {}
        for key, part in self._parts(score, [*by, self.axis]):
            means = part.groupby(["group", "prompt_id"])[score].mean()
            values, groups = means.to_numpy(float), means.index.get_level_values("group").to_numpy()
            share = shares[key[:-1]] if by else is_binary(self.table[score])
            interval = accuracy_interval(values, groups) if share else mean_interval(values, groups, seed=seed)
            dose = float(part["relative_dose"].mean()) if "relative_dose" in part else float("nan")
            numbers = (interval.mean, interval.low, interval.high, interval.n, int(part[score].isna().sum()), dose)
            rows.append((*key[:-1], *self._strength(part), *numbers))
        return pd.DataFrame(
            rows, columns=[*by, *self._strengths, "mean", "low", "high", "n", "n_missing", "relative_dose"]
        )

    def control_curve(self, score: str) -> pd.DataFrame:
        """Mean of a score per coefficient over the controls of a kind, with the prediction interval of a further one.

        A vector whose mean lies outside the interval is unlike these controls, if it has a score on the same prompts
        (else read `gain(score, over=...)`, which compares the prompts that both have); see
        `steerkit.stats.controls.control_band`. Controls of one vector and role, such as random directions, are a kind.

        Columns: vector (`VECTOR/ROLE`, or the role where it is a control of all), layer, coefficient, mean, low, high,
        n (prompts), k (controls), relative_dose.

        Raises:
            ValueError: no such score; a sweep without controls.

        Warns:
            FewWarning: a vector has a score on fewer prompts than its controls at a coefficient.

        Example:
            >>> import pandas as pd
            >>> lines = pd.concat([result.curve("rouge_l"), result.control_curve("rouge_l")])
        """
        self._check(score)
        kinds = {name: f"{of}/{role}" if of else role for name, (role, of) in self.roles().items() if role != "vector"}
        if not kinds:
            raise ValueError("expected controls among the vectors; got none. Sweep sk.controls.random(vectors) too.")
        table = self.table[self.table["vector"].isin(list(kinds))]
        scored = self.table[self.table[score].notna()].groupby([*PLACE, self.axis])["prompt_id"].nunique().to_dict()
        of_kind = {kind: self.roles()[name][1] for name, kind in kinds.items()}
        vectors = [name for name, (role, _) in self.roles().items() if role == "vector"]
        rows, fewer = [], []
        for key, part in table.groupby([table["vector"].map(kinds), "layer", self.axis], sort=False):
            wide = part.groupby(["group", "prompt_id", "vector"])[score].mean().unstack("vector")
            band = control_band(wide)
            if key[2] == 0 and band.k:  # a further control is unsteered there, too
                band = replace(band, low=band.mean, high=band.mean)
            for vector in vectors if of_kind[key[0]] is None else [of_kind[key[0]]]:
                n = int(scored.get((vector, *key[1:]), band.n))
                if n < band.n:
                    fewer.append(f"{vector!r} on {n} of {band.n} prompts at layer {key[1]}, {self.axis} {key[2]:g}")
            dose = float(part["relative_dose"].mean()) if "relative_dose" in part else float("nan")
            rows.append((*key[:-1], *self._strength(part), band.mean, band.low, band.high, band.n, band.k, dose))
        if fewer:
            named = "; ".join(dict.fromkeys(fewer[:3]))
            _warn(
                f"expected scores of a vector on the prompts of its controls; got {named}. "
                "Their means are of other prompts: read gain(score, over=...)."
            )
        columns = ["vector", "layer", *self._strengths, "mean", "low", "high", "n", "k", "relative_dose"]
        return pd.DataFrame(rows, columns=columns)

    def curve_auc(self, score: str, by: Sequence[str] = PLACE, normalize: bool = False, seed: int = 0) -> pd.DataFrame:
        """Trapezoid area under the curve of a score over the coefficients, with its interval over groups.

        The area is linear in the scores, so it is the mean over prompts of each prompt's own area.
        A prompt without a score at one of the coefficients has no area: it is left out, and counted in `n_missing`.
        `normalize=True` divides by the width of the coefficient grid, which makes it a mean score.
        Columns: `by`, curve_auc, low, high, n (groups), n_missing (prompts).
        """
        rows = []
        for key, part in self._parts(score, list(by)):
            wide = part.groupby(["group", "prompt_id", self.axis])[score].mean().unstack()
            areas = [
                area_under(wide.columns, row, normalize) if np.isfinite(row).all() else np.nan
                for row in wide.to_numpy()
            ]
            interval = mean_interval(areas, wide.index.get_level_values("group"), seed=seed)
            rows.append((*key, interval.mean, interval.low, interval.high, interval.n, int(np.isnan(areas).sum())))
        return pd.DataFrame(rows, columns=[*by, "curve_auc", "low", "high", "n", "n_missing"])

    def gain(
        self, score: str, over: Sequence[str] | None = None, vectors: Sequence[str] | None = None, seed: int = 0
    ) -> pd.DataFrame:
        """The gain of a score, per vector, layer and coefficient: over coefficient 0, or over control vectors.

        Over coefficient 0: the mean of the differences within a prompt (samples averaged first), with the interval and
        the sign-flip p-value of `steerkit.stats.mean.mean_interval`. It asks whether the steering changes the score.

        Over controls: the difference to their mean, with the prediction interval of
        `steerkit.stats.controls.against_controls`. It asks whether the vector is unlike a further control of the same
        kind, and its p-values are those of this question.

        A warning says when there are fewer than 10 prompts, when the steered texts of more than a tenth have no score
        where the others have one, or when fewer controls have a score than a rank of 5 % needs, which are 19.

        Args:
            over: names of control vectors that were swept at the same layer and coefficients; None is coefficient 0.
            vectors: the vectors whose gain is wanted; default all whose role is `vector`.

        Columns: vector, layer, (dose,) coefficient, gain, low, high, p (two-sided), p_rank (one-sided, larger than the
        controls), n (groups, or prompts), k (controls), n_missing (prompts that were swept and are left out, because a
        score is missing).

        Raises:
            ValueError: a vector is not in the table, or a control not at that layer and coefficient.
        """
        self._check(score)
        if isinstance(vectors, str) or isinstance(over, str) or (over is not None and not over):
            raise ValueError(f"expected lists of names; got vectors={vectors!r}, over={over!r}. Put it in a list.")
        there = list(self.table["vector"].unique())
        if unknown := [name for name in vectors or () if name not in there]:
            raise ValueError(f"expected vectors among {there[:12]}; got {unknown[:5]}. Choose of these.")
        scores_of, groups = self._scores_by_prompt(score)
        roles = self.roles()
        wanted = [name for name in roles if roles[name][0] == "vector"] if vectors is None else list(vectors)
        rows, missing = [], []
        strength_of = {key: self._strength(part) for key, part in self._parts(score, [*PLACE, self.axis])}
        binary = {name: is_binary(part[score]) for name, part in self.table.groupby("vector", sort=False)}
        swept = self.table.groupby([*PLACE, self.axis])["prompt_id"].nunique()
        for (vector, layer, coefficient), scores in scores_of.items():
            if coefficient == 0 or vector in (over or ()) or vector not in wanted:
                continue
            others = [(vector, layer, 0.0)] if over is None else [(name, layer, coefficient) for name in over]
            absent = [other for other in others if other not in scores_of]
            if absent:
                raise ValueError(
                    f"expected the controls in the table at the same layer and coefficient; missing: {absent[:3]}. "
                    "Sweep them too."
                )
            place = (vector, layer, *strength_of[vector, layer, coefficient])
            all_prompts = int(swept[vector, layer, coefficient])
            if over is None:
                differences = scores - scores_of[others[0]]
                one = mean_interval(differences, groups, seed=seed, binary=binary[vector])
                left_out = all_prompts - int(np.isfinite(differences).sum())
                rows.append((*place, one.mean, one.low, one.high, one.p, np.nan, one.n, 0, left_out))
                compared = ~np.isnan(scores_of[others[0]])
            else:
                found = against_controls(scores, np.stack([scores_of[other] for other in others], axis=1))
                numbers = (found.gain, found.low, found.high, found.p, found.p_rank, found.n, found.k)
                rows.append((*place, *numbers, all_prompts - found.n))
                compared = ~np.isnan([scores_of[other] for other in others]).all(axis=0)
            missing.append(_share_missing(scores, compared))
        columns = ["gain", "low", "high", "p", "p_rank", "n", "k", "n_missing"]
        found = pd.DataFrame(rows, columns=[*PLACE, *self._strengths, *columns])
        self._warn_of_few(found, over, missing)
        return found

    def _warn_of_few(self, found: pd.DataFrame, over: Sequence[str] | None, missing: Sequence[float]) -> None:
        """Warn of too few prompts or controls, and of prompts without a score, in a table of gains."""
        if not len(found):
            return
        if max(missing) > MANY_MISSING:
            worst = found.iloc[int(np.argmax(missing))]
            _warn(
                f"expected a score of almost every prompt; {worst['n_missing']:.0f} prompts of {worst['vector']!r} at "
                f"layer {worst['layer']}, {self.axis} {worst[self.axis]:g} have none and are left out. If the steering "
                "decides which ones have a score, the gain is biased.",
                4,
            )
        if over is None and found["n"].min() < FEW_PROMPTS:
            _warn(
                f"expected {FEW_PROMPTS} prompts or more for an interval that can be relied on; got "
                f"{found['n'].min()}. Sweep more prompts.",
                4,
            )
        if over is not None and (k := int(found["k"].min())) < (needed := controls_needed(0.05)):
            _warn(
                f"expected {needed} controls with a score or more, so that a rank can reach p = 0.05; got {k}. Sweep "
                f"more: steerkit.controls.random(vectors, n={needed}), or --random {needed} on the command line.",
                4,
            )

    def per_item(self, score: str, axis: str | None = None) -> pd.DataFrame:
        """The slope of each prompt's score over the coefficients, per vector and layer; see `steerkit.stats.items`.

        Samples of a prompt are averaged first. Where rows are choices, select one choice per prompt with `where`.

        Args:
            score: a column of scores, such as `probability`.
            axis: the column of the steering's strength; default `self.axis`.

        Columns: vector, layer, prompt_id, group, slope (score per unit of the axis), unsteered (the score at 0), n
        (strengths with a score).

        Raises:
            ValueError: no such column, fewer than two strengths, or several choices per prompt.
        """
        axis = axis or self.axis
        self._check(score, [axis])
        parts = []
        for key, part in self._parts(score, list(PLACE)):
            wide = part.groupby(["prompt_id", "group", axis], sort=False, dropna=False)[score].mean().unstack(axis)
            if len(wide.columns) < 2:
                raise ValueError(
                    f"expected two values of {axis} or more for a slope; got {list(wide.columns)} for {key}. Add some."
                )
            plain = wide[0.0] if 0.0 in wide else pd.Series(np.nan, index=wide.index)
            frame = pd.DataFrame(
                {
                    "slope": slopes(wide.columns.to_numpy(float), wide.to_numpy(float)),
                    "unsteered": plain.to_numpy(float),
                    "n": wide.notna().sum(axis=1).to_numpy(),
                },
                index=wide.index,
            ).reset_index()
            parts.append(frame.assign(vector=key[0], layer=[key[1]] * len(frame)))
        columns = [*PLACE, "prompt_id", "group", "slope", "unsteered", "n"]
        return pd.concat(parts, ignore_index=True)[columns]

    def check_one_choice(self) -> None:
        """`ValueError` where rows are choices and a prompt has several: a mean over them says nothing."""
        keys = [*PLACE, "coefficient", "prompt_id"]
        if "choice" in self.table and (self.table.groupby(keys, dropna=False)["choice"].nunique() > 1).any():
            raise ValueError(
                "expected one choice per prompt; got several. Select one, such as the matching answer: "
                "result.where(result.table['choice'] == ...)."
            )

    def wrong_way(self, score: str, axis: str | None = None) -> pd.DataFrame:
        """The share of prompts whose score falls as the steering grows, per vector and layer.

        A mean effect can hide that many prompts move the wrong way. The share of prompts with a slope below 0 (see
        `per_item`) is meant for scores that the vector should raise. A direction without an effect lowers about half of
        the prompts that move at all, so compare `share_of_moved` with one half, and with the rows of the controls.

        Columns: vector, layer, share, low, high (Wilson's 95 % interval over groups), unmoved (share of prompts with
        slope 0), share_of_moved, moved_low, moved_high (the same share among the prompts that move), median_slope, n
        (groups), n_missing (prompts without a slope).

        Source: Tan et al. 2024, arXiv 2407.12404, section 4 ("anti-steerable" examples).

        Example:
            >>> result.wrong_way("rouge_l")
        """
        rows = []
        for key, part in self.per_item(score, axis).groupby(list(PLACE), sort=False):
            slope = part["slope"].to_numpy(float)
            wrong = np.where(np.isnan(slope), np.nan, slope < 0)
            share = accuracy_interval(wrong, part["group"].to_numpy())
            there = slope[~np.isnan(slope)]
            unmoved, median = (float((there == 0).mean()), float(np.median(there))) if len(there) else (np.nan, np.nan)
            moved = accuracy_interval(np.where(slope == 0, np.nan, wrong), part["group"].to_numpy())
            counts = (share.n, int(np.isnan(slope).sum()))
            shares = (share.mean, share.low, share.high, unmoved, moved.mean, moved.low, moved.high)
            rows.append((*key, *shares, median, *counts))
        shown = ["share", "low", "high", "unmoved", "share_of_moved", "moved_low", "moved_high"]
        columns = [*PLACE, *shown, "median_slope", "n", "n_missing"]
        return pd.DataFrame(rows, columns=columns)

    def _scores_by_prompt(self, score: str) -> tuple[dict[tuple[Any, ...], np.ndarray], list[Any]]:
        """For each vector, layer and coefficient the mean score of each prompt, and the prompts' groups.

        Prompts are in the order of group and id, whatever the order of the rows; a prompt without a score is NaN.
        """
        keys = [*PLACE, self.axis, "group", "prompt_id"]
        means = self.table.groupby(keys, sort=False, dropna=False)[score].mean()
        prompts = sorted({(group, prompt_id) for *_, group, prompt_id in means.index})
        column_of = {prompt: number for number, prompt in enumerate(prompts)}
        scores_of: dict[tuple[Any, ...], np.ndarray] = {}
        for (*condition, group, prompt_id), value in means.items():
            row = scores_of.setdefault(tuple(condition), np.full(len(prompts), np.nan))
            row[column_of[group, prompt_id]] = value
        return scores_of, [group for group, _ in prompts]

    @property
    def _strengths(self) -> list[str]:
        """The columns that say how strongly was steered."""
        return ["coefficient"] if self.axis == "coefficient" else ["dose", "coefficient"]

    def _strength(self, part: pd.DataFrame) -> list[float]:
        """The values of `_strengths` for rows of one strength."""
        first = float(part[self.axis].iloc[0])
        return [first] if self.axis == "coefficient" else [first, float(part["coefficient"].mean())]

    def _parts(self, score: str, by: list[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
        self._check(score, by)
        return [(key, part) for key, part in self.table.groupby(by, sort=False, dropna=False)]

    def _check(self, score: str, by: Sequence[str] = ()) -> None:
        self.check_one_choice()
        if score not in self.table:
            raise ValueError(f"expected a score among the columns; got {score!r}. Add it with .score({score!r}) first.")
        if missing := [column for column in by if column not in self.table]:
            there = list(self.table)[:12]
            raise ValueError(f"expected columns to group by, such as {there}; got {missing}. Choose of these.")


def _with_layers(norms: Any) -> Any:
    """Norms of the stream by layer, or a list of these, as they were before JSON made texts of the layers."""
    if isinstance(norms, Mapping):
        return {int(layer): norm for layer, norm in norms.items()}
    return [_with_layers(one) for one in norms]


def _number(score: Callable[[pd.Series], float], row: pd.Series) -> float:
    """A function's score of a row; what it raises, and what is no number, names the row."""
    where = ", ".join(f"{key}={row[key]!r}" for key in KEYS if key in row)
    try:
        value = score(row)
    except Exception as error:
        error.add_note(f"while scoring the row {where}")
        raise
    if isinstance(value, Real | np.bool_):
        return float(value)
    raise TypeError(f"expected a number as the score of the row {where}; got {value!r:.60}. Return NaN where none is.")


def _share_missing(scores: np.ndarray, compared: np.ndarray) -> float:
    """The share of the prompts with a score of what is compared that have none of the steered texts; 0 if none has."""
    lost, count = int((compared & np.isnan(scores)).sum()), int(compared.sum())
    return 0.0 if lost == count else lost / count


def _warn(message: str, level: int = 3) -> None:
    warnings.warn(message, FewWarning, stacklevel=level)


def check_swept_model(meta: Mapping[str, Any], model: Any) -> dict[str, str | None]:
    """Check that a model is the one that a sweep with this provenance was run with, if the provenance says.

    Returns:
        The model's `model_fingerprint` and `adapter_fingerprint`.

    Raises:
        ValueError: other weights or another adapter.
    """
    from steerkit.models.identity import fingerprint

    actual = dict(zip(("model_fingerprint", "adapter_fingerprint"), fingerprint(model), strict=True))
    expected = {key: meta.get(key) for key in actual}
    if expected["model_fingerprint"] is not None and actual != expected:
        raise ValueError(f"expected the sweep's own model, {expected}; got {actual}. Load that checkpoint and adapter.")
    return actual


def ids_of(table: pd.DataFrame) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The token ids of each row: `(prompt, continuation)`, the continuation with its end-of-sequence token.

    Raises:
        ValueError: a table without them.
    """
    if missing := [name for name in ("prompt_ids", "ids") if name not in table]:
        raise ValueError(
            f"expected a sweep's table with token ids; got none of {missing}. Repeat the sweep with this version."
        )
    prompt_ids, ids = ([tuple(map(int, row)) for row in table[name]] for name in ("prompt_ids", "ids"))
    return prompt_ids, ids


def _unsteered(table: pd.DataFrame, values: Sequence[Any] | None = None) -> list[Any]:
    """For each row, the text (or value) of the same prompt and sample (or choice) at coefficient 0."""
    values = _texts(table) if values is None else list(values)
    keys = list(table[key_columns(table)[-2:]].itertuples(index=False, name=None))
    plain = dict[Any, Any]()
    for key, coefficient, value in zip(keys, table["coefficient"], values, strict=True):
        if coefficient == 0:
            plain.setdefault(key, value)
    if absent := [key for key in keys if key not in plain]:
        raise ValueError(f"expected a text at coefficient 0 per prompt and sample; got none for {absent[0]}. Sweep it.")
    return [plain[key] for key in keys]


def _references(table: pd.DataFrame) -> list[str]:
    if "reference" not in table or table["reference"].isna().any():
        raise ValueError(
            "expected a reference for every prompt; some have none. Give the sweep rows with 'prompt' and 'reference'."
        )
    return table["reference"].tolist()


def _texts(table: pd.DataFrame) -> list[Any]:
    """The text of each row; None where it overflowed, which a table may hold as NaN."""
    return [text if isinstance(text, str) else None for text in table["text"]]


PURE: dict[str, Callable[[pd.DataFrame], np.ndarray]] = {
    "rouge_l": lambda t: rouge_l(_texts(t), _references(t)),
    "rouge_l_symbols": lambda t: rouge_l(_texts(t), _references(t), tokenizer="symbols"),
    "rouge_l_unicode": lambda t: rouge_l(_texts(t), _references(t), tokenizer="unicode"),
    "distance": lambda t: 1 - rouge_l(_texts(t), _unsteered(t), tokenizer="symbols"),
    "distinct_2": lambda t: np.array([distinct_n(text, 2) for text in _texts(t)]),
    "repeated_4grams": lambda t: np.array([repeated_ngrams(text, 4) for text in _texts(t)]),
}


LESS_IS_BETTER = ("perplexity", "repeated_4grams", "kl")
"""Scores of what steering costs: fluency lost, text repeated, distribution changed."""


def of_words(words: Sequence[str]) -> Callable[[pd.Series], float]:
    """A score that counts how many words of a row's text are among these, whatever their case.

    Raises:
        ValueError: no word, or one that is not a single word.
    """
    among = {word.strip().lower() for word in words}
    if not among or any(not re.fullmatch(r"[^\W_]+", word) for word in among):
        raise ValueError(f"expected single words; got {sorted(words)}. Put commas between them.")
    return lambda row: float(sum(word in among for word in re.findall(r"[^\W_]+", row["text"].lower())))
