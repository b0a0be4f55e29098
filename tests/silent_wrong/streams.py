"""Wrong streams, positions, padding, vectors and adapters."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import steerkit as sk
from steerkit.capture.activations import Activations
from steerkit.generation.engine import Engine, Row
from steerkit.io import run_folder
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.models.blocks import find_blocks
from steerkit.models.model import evaluating
from steerkit.probes.probe import fit_probe
from steerkit.steering.steering import Steering
from steerkit.text.tokens import pad
from steerkit.vectors.extract import logistic
from steerkit.vectors.vector import SteeringVector
from tests.models.test_models import adapter
from tests.reference import greedy, hidden_states
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [(5, 9, 14), (7, 3, 2, 8, 11, 40, 41), (200,)]
IDS = torch.tensor([ROWS[1]])
TEXTS = ["a", "Two words", "A longer text, with a comma."]

Read = Callable[[Any, int], Tensor]


@contextlib.contextmanager
def hooked(model: Any, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A plain hook that replaces the stream after a block."""

    def hook(_: Any, __: Any, out: Any) -> Any:
        changed = change(out if isinstance(out, Tensor) else out[0])
        return changed if isinstance(out, Tensor) else (changed, *out[1:])

    handle = find_blocks(model).modules[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def plain_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# 1 and 9. Where is a layer's stream?


def check_a_layer_is_read_where_it_is_written(read: Read, layers: Sequence[int]) -> None:
    """Adding a vector after a block moves what is read there by that vector, and nothing of what is read before."""
    model = tiny_model()
    for layer in layers:
        push = vector(model, layer)
        before = {at: read(model, at) for at in range(layer + 1)}
        with Steering(push, 1.0, "all").on(model):
            after = {at: read(model, at) for at in range(layer + 1)}
        torch.testing.assert_close(
            after[layer] - before[layer], push.layers[layer].expand_as(before[layer]), rtol=1e-4, atol=1e-4
        )
        assert all(torch.equal(after[at], before[at]) for at in range(layer))


def captured(model: Any, layer: int) -> Tensor:
    with torch.no_grad(), sk.capture_resid(model, layer) as streams:
        model(input_ids=IDS, use_cache=False)
    return streams[layer][0]


def last_hidden_state(model: Any, layer: int) -> Tensor:
    """Right for every layer but the last, whose entry is after the final norm."""
    return hidden_states(model, ROWS[1])[layer + 1]


def embedding_counted_as_a_layer(model: Any, layer: int) -> Tensor:
    return hidden_states(model, ROWS[1])[layer]


# 2. Positions under a KV cache


Write = Callable[[Any, Sequence[int], SteeringVector, int], list[int]]


def check_generated_tokens_are_steered_under_a_cache(write: Write) -> None:
    model, moved = tiny_model(), 0
    for row in ROWS:
        push = vector(model, 1, 2)
        truth = greedy(model, row, 10, (), dict(push.layers), 1.5)
        assert write(model, row, push, 10) == truth
        moved += truth != greedy(model, row, 10)
    assert moved


def columns_of_the_whole_text(model: Any, prompt: Sequence[int], push: SteeringVector, new: int) -> list[int]:
    with Steering(push, 1.5, "generated", layer="all").on(model):
        return cached(model, prompt, new)


def columns_of_the_chunk(model: Any, prompt: Sequence[int], push: SteeringVector, new: int) -> list[int]:
    """Under a cache a chunk of one token is column 0, which is never beyond the prompt."""

    def change(value: Tensor, stream: Tensor) -> Tensor:
        inside = (torch.arange(stream.shape[1]) >= len(prompt))[:, None]
        return stream + 1.5 * inside * value

    with contextlib.ExitStack() as stack:
        for layer, value in push.layers.items():
            stack.enter_context(hooked(model, layer, lambda stream, value=value: change(value, stream)))
        return cached(model, prompt, new)


def cached(model: Any, prompt: Sequence[int], new: int) -> list[int]:
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.tensor([list(prompt)])
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


# 3. Left padding and position ids


def check_left_padding_moves_nothing(next_logits: Callable[[Any, Sequence[tuple[int, ...]]], Tensor]) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row])).logits[0, -1] for row in ROWS]
    torch.testing.assert_close(next_logits(model, ROWS), torch.stack(alone), rtol=1e-4, atol=1e-4)


def positions_of_each_row(model: Any, rows: Sequence[tuple[int, ...]]) -> Tensor:
    with torch.no_grad(), evaluating(model):
        engine = Engine(model, [Row(row) for row in rows], 1)
        return engine.forward(engine.last_tokens(), engine.width - 1)[:, -1]


def positions_of_the_batch(model: Any, rows: Sequence[tuple[int, ...]]) -> Tensor:
    ids, mask, _ = pad(rows, "left")
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=columns).logits[:, -1]


# 4. Padding and the attention mask


def check_padding_is_not_attended(means: Callable[[Any, Any, Sequence[str]], Tensor]) -> None:
    """`means` gives the mean stream of each text after each block: `[text, layer, d_model]`."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    truth = [torch.stack(hidden_states(model, tokenizer(text)["input_ids"]))[1:-1].mean(1) for text in TEXTS]
    torch.testing.assert_close(means(model, tokenizer, TEXTS)[:, :-1], torch.stack(truth), rtol=1e-4, atol=1e-4)


def masked(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    return sk.collect(model, tokenizer, texts, position="mean", batch_tokens=10_000).resid


def unmasked(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    ids, mask, positions = pad([tokenizer(text)["input_ids"] for text in texts], "left")
    with torch.no_grad(), sk.capture_resid(model) as streams:
        model(input_ids=ids, position_ids=positions)
    weights = mask / mask.sum(1, keepdim=True)
    return torch.stack([torch.einsum("bp,bpd->bd", weights, stream) for stream in streams.values()], dim=1)


# 5. The space of a probe's direction


def check_a_probes_direction_is_in_the_streams_own_space(direct: Callable[[Activations], Tensor]) -> None:
    """Features of scale 1 and 100 that decide equally: a unit of the first moves the logit 100 times as far."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 2)) * [1.0, 100.0]
    truth = np.array([1.0, 0.01])
    right = x @ truth + 0.3 * rng.logistic(size=2000) > 0
    items = pd.DataFrame({"label": np.where(right, "positive", "negative"), "group": "g"})
    found = direct(Activations(torch.tensor(x[:, None], dtype=torch.float32), (0,), items)).double().numpy()
    assert found @ truth / np.linalg.norm(found) / np.linalg.norm(truth) > 0.999


def raw_direction(acts: Activations) -> Tensor:
    return logistic(acts).layers[0]


def standardised_direction(acts: Activations) -> Tensor:
    x = acts.at(0)
    return fit_probe((x - x.mean(0)) / x.std(0), acts.items["label"].tolist()).direction("positive")


# 6. Coefficient 0


def check_coefficient_zero_changes_no_bit(logits: Callable[[Any, SteeringVector, float], Tensor]) -> None:
    model = tiny_model()
    plain, push = plain_logits(model), vector(model, 1)
    assert torch.equal(logits(model, push, 0.0), plain)
    assert not torch.equal(logits(model, push, 1.0), plain)


def added(model: Any, push: SteeringVector, coefficient: float) -> Tensor:
    with Steering(push, coefficient, "all").on(model):
        return plain_logits(model)


def added_with_the_norm_restored(model: Any, push: SteeringVector, coefficient: float) -> Tensor:
    def change(stream: Tensor) -> Tensor:
        moved = stream + coefficient * push.layers[1]
        return moved / moved.norm(dim=-1, keepdim=True) * stream.norm(dim=-1, keepdim=True)

    with hooked(model, 1, change):
        return plain_logits(model)


# 7. A mode that does not exist


def check_an_unknown_mode_is_an_error(logits: Callable[[Any, SteeringVector, str, str], Tensor]) -> None:
    model = tiny_model()
    plain, push = plain_logits(model), vector(model, 1)
    for operation in ("add", "ablate"):
        assert not torch.equal(logits(model, push, "all", operation), plain)
    for positions, operation in (("all", "addition"), ("all", "Add"), ("all", ""), ("every", "add"), ("ALL", "add")):
        try:
            logits(model, push, positions, operation)
        except ValueError as error:
            assert "expected" in str(error)
        else:
            raise AssertionError(f"{positions!r} with {operation!r} steered nothing and said nothing")


def refused(model: Any, push: SteeringVector, positions: str, operation: Any) -> Tensor:
    with Steering(push, 1.0, positions, operation).on(model):
        return plain_logits(model)


def ignored(model: Any, push: SteeringVector, positions: str, operation: str) -> Tensor:
    unit = push.unit().layers[1]

    def change(stream: Tensor) -> Tensor:
        if positions == "all" and operation == "add":
            return stream + push.layers[1]
        if positions == "all" and operation == "ablate":
            return stream - (stream @ unit)[..., None] * unit
        return stream

    with hooked(model, 1, change):
        return plain_logits(model)


# 8. What a vector file says of itself


def check_a_loaded_vector_knows_where_it_is_from(load: Callable[[Path], SteeringVector], folder: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = [sk.ContrastPair("a", "yes", "no")]
    made = sk.difference_in_means(sk.collect(model, tokenizer, pairs, layers=[1]))
    made.save(folder / "v.safetensors")
    found = load(folder / "v.safetensors")
    assert torch.equal(found.layers[1], made.layers[1])
    assert found.meta == made.meta
    with pytest.raises(ValueError, match="foreign=True"), Steering(found).on(tiny_model(seed=1)):
        pass


def values_only(path: Path) -> SteeringVector:
    return SteeringVector({int(name.removeprefix("layer.")): value for name, value in load_file(path).items()})


# 10. An adapter that did not land


Load = Callable[[Path, Path], Any]


def check_an_adapter_lands_or_is_refused(load: Load, folder: Path) -> None:
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    adapter(folder / "good")
    adapter(folder / "lost")
    file = folder / "lost" / "adapter_model.safetensors"
    save_file({name.replace("layers.1.", "layers.9."): value for name, value in load_file(file).items()}, file)
    base = plain_logits(tiny_model())
    assert not torch.allclose(plain_logits(load(folder / "base", folder / "good")), base, atol=1e-3)
    with pytest.raises(ValueError, match="did not land"):
        load(folder / "base", folder / "lost")


def landed(base: Path, adapted: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sk.load(base, adapter=adapted)[0]


def hoped_for(base: Path, adapted: Path) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(sk.load(base)[0], str(adapted)).eval()


# 11. One attention kernel, then another


Check = Callable[[Path, Mapping[str, Any]], None]


def check_rows_of_two_kernels_share_no_table(check_config: Check, folder: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()

    def run(kernel: str) -> Any:
        model.set_attn_implementation(kernel)
        with mock.patch.object(run_folder, "check_config", check_config):
            return sk.sweep(model, tokenizer, vector(model, 1), ["ab"], coefficients=[1], max_new_tokens=2, out=folder)

    assert run("eager").meta["attention"] == "eager"
    with pytest.raises(ConfigurationChanged, match="attention"):
        run("sdpa")


CHECK_CONFIG = run_folder.check_config


def forgets_the_kernel(folder: Path, config: Mapping[str, Any], free: Collection[str] = ()) -> None:
    CHECK_CONFIG(folder, {**config, "attention": None}, free)


def without_folder(check: Callable[[Any], None]) -> Callable[[Any, Path], None]:
    return lambda implementation, _: check(implementation)


def at(*layers: int) -> Callable[[Any, Path], None]:
    return lambda read, _: check_a_layer_is_read_where_it_is_written(read, layers)


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {  # in the order of the list: check, ours, mutant
    "the last layer is read before the final norm": (at(3), captured, last_hidden_state),
    "new tokens are told from the prompt under a cache": (
        without_folder(check_generated_tokens_are_steered_under_a_cache),
        columns_of_the_whole_text,
        columns_of_the_chunk,
    ),
    "position ids are right under left padding": (
        without_folder(check_left_padding_moves_nothing),
        positions_of_each_row,
        positions_of_the_batch,
    ),
    "a padded batch has an attention mask": (without_folder(check_padding_is_not_attended), masked, unmasked),
    "a probe's direction is in the raw space": (
        without_folder(check_a_probes_direction_is_in_the_streams_own_space),
        raw_direction,
        standardised_direction,
    ),
    "coefficient 0 changes nothing": (
        without_folder(check_coefficient_zero_changes_no_bit),
        added,
        added_with_the_norm_restored,
    ),
    "an unknown mode is an error": (without_folder(check_an_unknown_mode_is_an_error), refused, ignored),
    "a vector keeps its metadata": (
        check_a_loaded_vector_knows_where_it_is_from,
        SteeringVector.load,
        values_only,
    ),
    "layers are counted in one way": (at(0, 1, 2), captured, embedding_counted_as_a_layer),
    "an adapter that did not land is refused": (check_an_adapter_lands_or_is_refused, landed, hoped_for),
    "rows of two attention kernels are not mixed": (
        check_rows_of_two_kernels_share_no_table,
        CHECK_CONFIG,
        forgets_the_kernel,
    ),
}
