"""The checks: what capture and steering rely on, each tested on the given model.

Each check is a function of the model and its tokenizer that returns a state and a detail.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from steerkit.capture.collect import collect_each
from steerkit.capture.pooling import Position
from steerkit.capture.resid import capture_resid
from steerkit.generation.batches import exact
from steerkit.generation.generate import generate
from steerkit.models.blocks import find_blocks
from steerkit.models.cache_argument import counts_tokens
from steerkit.models.context import context_length
from steerkit.models.ends import ends_of
from steerkit.models.hooks import edit_streams
from steerkit.models.identity import describe, fingerprint, template_changes
from steerkit.models.kernels import running
from steerkit.models.model import device_of, unwrap
from steerkit.models.site_names import DEFAULT, SITES
from steerkit.models.sites import find_sites, layers_with
from steerkit.patching.patch import patch
from steerkit.steering.conditions import Condition, Decide
from steerkit.steering.operations import OPERATIONS
from steerkit.steering.steering import Steering
from steerkit.text.prompt import Prompt, encode_prompt, render
from steerkit.text.spans import SpannedText, passage_of
from steerkit.text.thinking import drops_system, opens_thinking
from steerkit.text.tokens import adds_space, decode, encode
from steerkit.vectors.vector import SteeringVector

State = Literal["ok", "note", "failed"]
Result = tuple[State, str]

TEXTS = ("The sea is calm today.", "One two three four five six seven eight nine ten.", "Yes.")
BOUNDARIES = ("Hello", " was here", "a  b ", "\n\nc", "12*13", "na\u00efve \u6d77")
UNUSED = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_length",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "exponential_decay_length_penalty",
)
"""Settings of a generation configuration that change texts, and that `steerkit.generate` does not use."""
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
QUESTION = [{"role": "user", "content": "How do tides work?"}]
NEW_TOKENS = 8
FEW_TOKENS = 4
LARGE_COEFFICIENT = 50.0


def residual_stream(model: nn.Module, tokenizer: Any) -> Result:
    """Find the decoder blocks and verify that each receives what the block before it returned."""
    blocks = find_blocks(model)
    return "ok", (
        f"{len(blocks)} blocks at {blocks.path}, d_model {blocks.d_model}; each receives what the one before returned"
    )


def sites(model: nn.Module, tokenizer: Any) -> Result:
    """Find the verified sites, and check at each, in the middle layer of those that have it, that coefficient 0 changes
    no bit of the logits and that an added vector and a clamp leave in the site's value what their formulas say.
    """
    blocks = find_blocks(model)
    found = find_sites(model)
    ids = _ids(model, tokenizer, TEXTS[0])
    plain = _logits(model, ids)
    shown, notes = [], []
    for site in SITES:
        layers = layers_with(model, blocks, site) if site == DEFAULT or found.layers(site) else []
        if len(layers) < len(blocks):
            layer = next(layer for layer in blocks.modules if layer not in layers)
            notes.append(f"{site} at {layers or 'no layer'}: {found.reasons[site, layer]}")
        else:
            shown.append(site)
        if not layers:
            continue
        layer = layers[len(layers) // 2]
        with capture_resid(model, layer, site=site) as read:
            _logits(model, ids)
        before = read[layer][0].double().cpu()
        push = _direction_at(model, site, layer, before)
        with Steering(push, 0.0, "all", foreign=True).on(model):
            if not torch.equal(_logits(model, ids), plain):
                return "failed", f"coefficient 0 at {site} of block {layer} changes the logits"
        for name in ("add", "clamp"):
            with (
                Steering(push, 1.0, "all", name, foreign=True).on(model),
                capture_resid(model, layer, site=site) as changed,
            ):
                moved = _logits(model, ids)
            vector, after = push.layers[layer].double(), changed[layer][0].double().cpu()
            if not (error := _operation_error(name, before, after, vector, 1.0)) <= _tolerance(model):
                return "failed", f"{name} at {site} of block {layer} misses its formula by {error:.1e} of the norm"
            if torch.equal(moved, plain):
                return "failed", f"{name} at {site} of block {layer} does not change the logits"
    return "note" if notes else "ok", "; ".join([f"{', '.join(shown)} verified in all blocks", *notes])


def steered_sites(model: nn.Module, tokenizer: Any) -> Result:
    """Check that a clamp, and an addition under a condition read where it acts, at each verified site give the same
    texts in one mixed batch with a cache and one by one without.
    """
    blocks, text = find_blocks(model), TEXTS[1]
    positions = "from_last_prompt_token" if counts_tokens(model) else "all"
    rows: list[Steering] = []
    for site in SITES[:-1]:
        if not (layers := find_sites(model).layers(site)):
            continue
        layer = layers[len(layers) // 2]
        with capture_resid(model, layer, site=site) as read:
            _logits(model, _ids(model, tokenizer, text))
        value = read[layer][0].float().cpu()
        push = _direction_at(model, site, layer, value)
        when = Condition(push, above=_middle(Condition(push, above=0.0).scores(value)), decide="token")
        rows.append(Steering(push, 1.0, positions, "clamp", foreign=True))
        rows.append(Steering(push, 1.0, positions, foreign=True, when=when))
    if not rows:
        return "note", f"no site but {DEFAULT} was verified in {blocks.path}"
    with torch.inference_mode(), running(model):
        slow = [_greedy(model, tokenizer, text, row, FEW_TOKENS) for row in rows]
    mixed = [one for row in rows for one in (row, None)]
    fast = generate(model, tokenizer, [text] * len(mixed), max_new_tokens=FEW_TOKENS, steering=mixed)
    n_same = sum(a == b for a, b in zip(slow, fast[::2], strict=True))
    detail = f"{n_same} of {len(rows)} texts steered at other sites are the same in a mixed batch and alone"
    if n_same == len(rows) and len(set(fast[1::2])) == 1:
        return "ok", detail
    return "failed" if _tolerance(model) < 1e-3 else "note", detail


def patching(model: nn.Module, tokenizer: Any) -> Result:
    """Check that another run's stream, put in after the middle block at all positions, gives that run's prediction."""
    blocks = find_blocks(model)
    layer = len(blocks) // 2
    clean = encode_prompt(tokenizer, TEXTS[1])
    corrupted = (*clean[:1], *clean[:0:-1])
    with capture_resid(model, layer) as read:
        wanted = _logits(model, torch.tensor([clean], device=device_of(model)))[0, -1].float().log_softmax(-1)
    with edit_streams({layer: blocks.modules[layer]}, lambda _, stream: read[layer].to(stream.dtype)):
        put_in = _logits(model, torch.tensor([corrupted], device=device_of(model)))[0, -1].float().log_softmax(-1)
    own, other = (Prompt.of_ids(tokenizer, ids) for ids in (clean, corrupted))
    whole = {"whole": (0, len(clean))}
    (row,) = patch(model, tokenizer, own, other, layers=layer, positions=whole, metric="kl").pairs.itertuples()
    divergence = float((wanted.exp() * (wanted - put_in)).sum())
    error = abs(row.patched - divergence) / row.base
    if not error < 10 * _tolerance(model):
        return "failed", f"patching all positions of block {layer} misses the run with its stream by {error:.1e}"
    detail = f"the effect of all positions of the stream after block {layer} is {row.effect:.4f}"
    if abs(row.effect - 1) < 10 * _tolerance(model):
        return "ok", detail
    return "note", f"{detail}, not 1: later blocks read more than this stream"


def weights(model: nn.Module, tokenizer: Any) -> Result:
    """Report dtype, attention kernel and context length; float16 gets a note."""
    about = describe(model, None)
    detail = f"{about['dtype']}, attention {about['attention']}, context {context_length(model) or 'unknown'}"
    if about["dtype"] == "float16":
        return "note", f"{detail}; float16 overflows in some models: prefer bfloat16 or float32"
    return "ok", detail


def tokenizer(model: nn.Module, tokenizer: Any) -> Result:
    """Check the chat template and that every token has an embedding."""
    details = []
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if has_template:
        rendered = encode_prompt(tokenizer, QUESTION)
        bos = tokenizer.bos_token_id
        is_doubled = bos is not None and list(rendered[:2]) == [bos, bos]
        details.append("the chat template doubles the first token" if is_doubled else "has a chat template")
    else:
        details.append("no chat template: pass prompts as text, messages are refused")
    if tokenizer.pad_token_id is None:
        details.append("no pad token, and none is needed")
    n_tokens = len(tokenizer)
    n_embeddings = int(unwrap(model).get_input_embeddings().weight.shape[0])
    if n_tokens > n_embeddings:
        details.append(f"{n_tokens} tokens for {n_embeddings} embeddings: some tokens have no embedding")
        return "failed", "; ".join(details)
    return "ok" if has_template else "note", "; ".join(details)


def boundaries(model: nn.Module, tokenizer: Any) -> Result:
    """Check that continuations and spans are cut where their texts are, and that their tokens decode to them."""
    normalised = []
    for text in BOUNDARIES:
        found = decode(tokenizer, encode(tokenizer, text), skip_special=False)
        if found != text:
            normalised.append((text, found))
    for text, found in normalised:
        if "".join(found.lower().split()) != "".join(text.lower().split()):
            return "failed", f"the tokens of the continuation {text!r} decode to {found!r}"
    whole = "".join(BOUNDARIES[:2])
    cut = len(BOUNDARIES[0])
    passage = passage_of(tokenizer, SpannedText(whole, ((0, cut), (cut, len(whole))), prompt="Q:"), "")
    (first, middle), (again, last) = passage.spans
    if not (first == len(encode_prompt(tokenizer, "Q:")) and middle == again and last == len(passage.ids)):
        return "failed", f"the spans of {whole!r} are {passage.spans} of {len(passage.ids)} tokens"
    if normalised:
        return "note", f"the tokenizer normalises texts: {normalised[0][0]!r} becomes {normalised[0][1]!r}"
    spaced = "; it puts a space before a text, which continuations do without" if adds_space(tokenizer) else ""
    return "ok", f"{len(BOUNDARIES)} continuations decode to themselves, spans are cut exactly{spaced}"


def template(model: nn.Module, tokenizer: Any) -> Result:
    """Check that the chat template gives the same prompt again, and what it does with system messages and thoughts."""
    if not getattr(tokenizer, "chat_template", None):
        return "ok", "no chat template"
    if len({render(tokenizer, QUESTION).ids for _ in range(3)}) > 1:
        return "failed", "the chat template renders the same messages otherwise each time"
    notes = []
    if template_changes(tokenizer):
        notes.append("it writes the date: the same messages are another prompt tomorrow; keep the Prompt of `render`")
    if drops_system(tokenizer) or not _takes_system(tokenizer):
        notes.append("it leaves out system messages, or refuses them")
    if opens_thinking(render(tokenizer, QUESTION).text):
        notes.append("it opens a thought (<think>): what follows the prompt is thinking")
    return ("note", "; ".join(notes)) if notes else ("ok", "the same messages give the same prompt")


def _takes_system(tokenizer: Any) -> bool:
    try:
        render(tokenizer, [{"role": "system", "content": "Be brief."}, *QUESTION])
    except ValueError:
        return False
    return True


def generation_settings(model: nn.Module, tokenizer: Any) -> Result:
    """Report the end tokens, and settings of the generation configuration that `generate` does not use."""
    ends = sorted(ends_of(model, tokenizer))
    config = getattr(unwrap(model), "generation_config", None)
    unused = {name: getattr(config, name, None) for name in UNUSED}
    unused = {name: value for name, value in unused.items() if value not in (None, NEUTRAL.get(name), [], {})}
    if not ends:
        return "note", "no token ends a text: every text has max_new_tokens"
    if unused:
        return "note", f"ends at {ends}; steerkit.generate does not use {unused} of the generation configuration"
    return "ok", f"ends at {ends}"


def causality(model: nn.Module, tokenizer: Any) -> Result:
    """Check that the stream at a token does not change with the tokens after it."""
    ids = _ids(model, tokenizer, TEXTS[1])
    other = ids.clone()
    half = ids.shape[1] // 2
    other[:, half:] = ids[:, half:].roll(1, 1)
    streams = []
    for row in (ids, other):
        with torch.inference_mode(), running(model), capture_resid(model) as read:
            model(input_ids=row, use_cache=False)
        streams.append(torch.stack([read[layer][0, :half].float().cpu() for layer in sorted(read)]))
    change = _relative_difference(streams[1], streams[0])
    state: State = "ok" if change < _tolerance(model) else "failed"
    return state, f"later tokens change the stream at earlier ones by {change:.1e} of its size"


def hidden_states(model: nn.Module, tokenizer: Any) -> Result:
    """Compare the captured streams with transformers' `output_hidden_states`."""
    ids = _ids(model, tokenizer, TEXTS[1])
    count = len(find_blocks(model))
    with torch.inference_mode(), running(model), capture_resid(model) as streams:
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states

    def inner_difference(first: int) -> float:
        """The largest difference of an inner layer, where `states[first]` is the output of block 0."""
        differences = (_relative_difference(streams[k], states[k + first]) for k in range(count - 1))
        return max(differences, default=0.0)

    if inner_difference(1) > 1e-6 and inner_difference(0) <= 1e-6:
        return "note", "inner layers equal output_hidden_states, which begins after block 0 and not with the embedding"
    if inner_difference(1) > 1e-6:
        return "failed", f"inner layers differ from output_hidden_states by {inner_difference(1):.1e}"
    last = streams[count - 1]
    if states[-1].shape != last.shape:
        widths = f"{last.shape[-1]} wide where its last entry is {states[-1].shape[-1]}"
        return "note", f"inner layers equal output_hidden_states; the stream is {widths}"
    if _relative_difference(last, states[-1]) > 1e-6:
        return "note", "inner layers equal output_hidden_states; its last entry is after the final norm, ours before it"
    return "ok", "all layers equal output_hidden_states"


def padding(model: nn.Module, tokenizer: Any) -> Result:
    """Compare the stream of a text alone with its stream in a padded batch, at its first and at its last token."""
    positions: list[Position] = ["first", "last"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "position='first' reads position 0")  # it is compared with itself
        together = collect_each(model, tokenizer, TEXTS, positions=positions, batch_tokens=10_000)
        alone = [collect_each(model, tokenizer, [text], positions=positions) for text in TEXTS]
    difference = max(
        _relative_difference(together[position].resid, torch.cat([one[position].resid for one in alone]))
        for position in positions
    )
    state: State = "ok" if difference < _tolerance(model) else "failed"
    return state, f"a text alone and in a padded batch differ by {difference:.1e} of their size"


def coefficient_zero(model: nn.Module, tokenizer: Any) -> Result:
    """Check that coefficient 0 changes no bit of the logits and that coefficient 1 changes them."""
    ids = _ids(model, tokenizer, TEXTS[0])
    plain = _logits(model, ids)
    with Steering(_direction(model), 0.0, "all", foreign=True).on(model):
        zero = _logits(model, ids)
    with Steering(_direction(model), 1.0, "all", foreign=True).on(model):
        change = _relative_difference(_logits(model, ids), plain)
    if not torch.equal(zero, plain):
        return "failed", "steering with coefficient 0 changes the logits"
    if change == 0:
        return "failed", "steering with coefficient 1 does not change the logits"
    return "ok", f"changes nothing, bit for bit; coefficient 1 changes the logits by {change:.0%}"


def cache(model: nn.Module, tokenizer: Any) -> Result:
    """Compare steered texts from the batched engine with texts from one prompt at a time without a cache."""
    ways = exact(model)
    # without a KV cache new tokens and the prompt cannot be distinguished
    positions = "all" if not counts_tokens(model) else "from_last_prompt_token"
    steering = Steering(_direction(model), _coefficient_of_stream_norm(model, tokenizer), positions, foreign=True)
    with torch.inference_mode(), running(model):
        slow = [_greedy(model, tokenizer, text, steering) for text in TEXTS]
    fast = generate(model, tokenizer, list(TEXTS), max_new_tokens=NEW_TOKENS, steering=[steering] * len(TEXTS))
    plain = generate(model, tokenizer, list(TEXTS), max_new_tokens=NEW_TOKENS)
    n_same = sum(a == b for a, b in zip(slow, fast, strict=True))
    n_changed = sum(a != b for a, b in zip(slow, plain, strict=True))
    detail = (
        f"{n_same} of {len(TEXTS)} steered texts are the same with a cache in a batch and without either, {n_changed} "
        "of them differ from the unsteered texts"
    )
    if n_same < len(TEXTS) and _tolerance(model) < 1e-3:
        return "failed", detail
    if n_same < len(TEXTS):
        return "note", f"{detail}; in {describe(model, None)['dtype']} rounding decides between near-equal tokens"
    if not n_changed:
        return "note", f"{detail}: nothing is shown"
    if not ways.padded:
        detail += "; batched by length, since it cannot be padded on the left"
    if not ways.chunks:
        detail += "; scored token by token, as its layers need"
    return "ok", detail


def operations(model: nn.Module, tokenizer: Any) -> Result:
    """Check what each operation leaves in the stream, and that rows of a mixed batch keep their own operation."""
    ((layer, vector),) = (_direction(model) * _coefficient_of_stream_norm(model, tokenizer)).layers.items()
    one = SteeringVector({layer: vector})
    strengths = {name: 0.3 if name == "rotate" else 1.0 for name in OPERATIONS}
    ids = _ids(model, tokenizer, TEXTS[1])

    def stream(name: str, strength: float) -> Tensor:
        steering = Steering(one, strength, "all+0", name, foreign=True)
        with steering.on(model), capture_resid(model, layer) as streams:
            _logits(model, ids)
        return streams[layer][0].double().cpu()

    plain = stream("add", 0.0)
    errors = {
        name: _operation_error(name, plain, stream(name, strength), vector.double().cpu(), strength)
        for name, strength in strengths.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    if not all(error <= _tolerance(model) for error in errors.values()):  # NaN is no success
        return "failed", f"{worst} misses its formula by {errors[worst]:.1e} of the stream's norm"
    detail = f"{len(errors)} operations leave in the stream what their formulas say, to {errors[worst]:.1e} of its norm"
    positions = "from_last_prompt_token" if counts_tokens(model) else "all"
    rows = [Steering(one, strength, positions, name, foreign=True) for name, strength in strengths.items()]
    with torch.inference_mode(), running(model):
        slow = [_greedy(model, tokenizer, TEXTS[1], row) for row in rows]
    fast = generate(model, tokenizer, [TEXTS[1]] * len(rows), max_new_tokens=NEW_TOKENS, steering=rows)
    same = [name for name, a, b in zip(strengths, slow, fast, strict=True) if a == b]
    detail += f"; {len(same)} of {len(rows)} texts are the same in one batch with a cache and alone without"
    if len(same) == len(rows):
        return "ok", detail
    return "failed" if _tolerance(model) < 1e-3 else "note", detail


def conditions(model: nn.Module, tokenizer: Any) -> Result:
    """Check that conditional steering acts where plain forwards say, also in a mixed batch with a cache."""
    ((layer, _),) = _direction(model).layers.items()
    coefficient = _coefficient_of_stream_norm(model, tokenizer)
    read = _direction(model, seed=1)
    streams = []
    for text in TEXTS:
        with capture_resid(model, layer) as found:
            _logits(model, _ids(model, tokenizer, text))
        streams.append(found[layer][0].float().cpu())
    positions = "from_last_prompt_token" if counts_tokens(model) else "all"
    always = Steering(_direction(model), coefficient, positions, foreign=True)
    texts, n_same, n_fired = list(TEXTS), 0, 0
    modes: tuple[Decide, ...] = ("prompt", "token") if counts_tokens(model) else ("token",)
    for decide in modes:
        above = _middle(Condition(read, above=0.0).scores(torch.stack([one[-1] for one in streams])))
        when = Condition(read, above=above, decide=decide)
        steering = Steering(_direction(model), coefficient, positions, foreign=True, when=when)
        with torch.inference_mode(), running(model):
            slow = [_greedy(model, tokenizer, text, steering) for text in texts]
        rows = [one for _ in texts for one in (steering, None, always)]
        fast = generate(
            model, tokenizer, [text for text in texts for _ in range(3)], max_new_tokens=NEW_TOKENS, steering=rows
        )
        fires = when.holds(torch.stack([one[-1] for one in streams])).tolist()
        n_fired += sum(fires)
        for number, acts in enumerate(fires):
            own, plain, steered = fast[3 * number : 3 * number + 3]
            expected = slow[number] if decide == "token" else steered if acts else plain
            n_same += own == slow[number] == expected
    count = len(modes) * len(texts)
    detail = (
        f"{n_same} of {count} texts with a condition are the same in a mixed batch with a cache and alone without; it "
        f"held at the end of {n_fired // len(modes)} of {len(texts)} prompts"
    )
    if n_same == count:
        return "ok", detail
    return "failed" if _tolerance(model) < 1e-3 else "note", detail


def _middle(scores: Tensor) -> float:
    """The middle of the widest gap between scores."""
    ordered = scores.sort().values
    widest = int(ordered.diff().argmax())
    return float(ordered[widest : widest + 2].mean())


def _operation_error(name: str, old: Tensor, new: Tensor, vector: Tensor, strength: float) -> float:
    """Largest error of a steered stream `[pos, d_model]` over positions, in units of the old or expected norm.

    The larger of both norms at a position is its unit. NaN if a value is.

    The expected stream is built from its angle to the vector, its norm, and its part across the vector, where
    `steerkit.steering.operations` computes it by other means.
    """
    unit = vector / vector.norm()
    norm, along = old.norm(dim=-1, keepdim=True), (old @ unit)[:, None]
    across = old - along * unit
    side = across / across.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    if name == "rotate":
        angle = (torch.arccos((along / norm.clamp_min(1e-30)).clamp(-1, 1)) - strength).clamp(0, torch.pi)
        expected = norm * (angle.cos() * unit + angle.sin() * side)
    elif name == "add_normed":
        expected = norm * torch.nn.functional.normalize(old + strength * vector, dim=-1)
    else:
        target = {"add": along + strength * vector.norm(), "ablate": 0 * along, "clamp": 0 * along + vector.norm()}
        expected = across + target[name] * unit
    size = torch.maximum(norm[:, 0], expected.norm(dim=-1))  # a push far above a small stream rounds as the push does
    return float(((new - expected).norm(dim=-1) / size.clamp_min(1e-30)).max())


def compiled_caches(model: nn.Module, tokenizer: Any) -> Result:
    """Compare transformers' `generate` with a static cache inside `steering.on` with steering without a cache."""
    if not counts_tokens(model):
        return "note", "the model takes no cache that counts its tokens"
    steering = Steering(_direction(model), _coefficient_of_stream_norm(model, tokenizer), foreign=True)
    slow = _greedy_ids(model, tokenizer, TEXTS[0], steering)
    raised = (ValueError, NotImplementedError, AttributeError, TypeError, IndexError, KeyError)
    try:
        new = _with_static_cache(model, tokenizer, TEXTS[0], steering, len(slow))
    except raised as error:
        named = f"{type(error).__name__}: {error!s:.80}"
        try:
            _with_static_cache(model, tokenizer, TEXTS[0], None, len(slow))
        except raised:
            return "note", f"transformers does not generate with a static cache: {named}"
        return "failed", f"steering does not work with a static cache, the model alone does: {named}"
    if new == slow:
        return "ok", f"{len(new)} steered tokens are the same with a static cache, which is not compiled while steering"
    bare = _greedy_ids(model, tokenizer, TEXTS[0], None)
    if _with_static_cache(model, tokenizer, TEXTS[0], None, len(bare)) != bare:
        return "note", "transformers' generate with a static cache is not the model's plain forward, steered or not"
    state: State = "failed" if _tolerance(model) < 1e-3 else "note"
    return state, f"steered tokens differ with a static cache: {new} and {slow}"


def _with_static_cache(model: nn.Module, tokenizer: Any, text: str, steering: Steering | None, count: int) -> list[int]:
    """Greedy tokens by transformers' `generate` with a static cache; not compiled without a steering, too."""
    ids = _ids(model, tokenizer, text)
    settings = GenerationConfig(
        max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None, cache_implementation="static",
        disable_compile=steering is None,
    )  # fmt: skip
    with (
        torch.inference_mode(),
        running(model),
        mock.patch.object(unwrap(model), "generation_config", settings),
        contextlib.nullcontext() if steering is None else steering.on(model),
    ):
        found = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
    return [int(token) for token in found[0, ids.shape[1] :]]


def first_new_token(model: nn.Module, tokenizer: Any) -> Result:
    """Check that positions `generated` leave the first new token unchanged."""
    steering = Steering(_direction(model), LARGE_COEFFICIENT, "generated", foreign=True)
    texts = generate(model, tokenizer, [TEXTS[0]] * 2, max_new_tokens=1, steering=[None, steering])
    if texts[0] != texts[1]:
        return "failed", "positions 'generated' change the first new token"
    return "note", (
        "decided at the last prompt position: positions 'generated' cannot change it, 'from_last_prompt_token' can"
    )


def adapter(model: nn.Module, tokenizer: Any) -> Result:
    """Check that a PEFT adapter, if there is one, changes the logits."""
    if not hasattr(model, "peft_config"):
        return "ok", "none"
    ids = _ids(model, tokenizer, TEXTS[1])
    with_adapter = _logits(model, ids)
    with model.disable_adapter():  # type: ignore[operator]
        without = _logits(model, ids)
        base, off = fingerprint(model)
    change = _relative_difference(with_adapter, without)
    names = ", ".join(model.peft_config)  # type: ignore[arg-type]
    if change == 0:
        return "failed", f"{names}: the logits are those of the base model; the adapter is not active or empty"
    same_base, identity = fingerprint(model)
    if identity is None or off is not None or base != same_base:
        return "failed", f"{names}: changes the logits, but the fingerprints {same_base}, {identity} do not say so"
    return "ok", f"{names}: changes the logits by {change:.1%}; fingerprint {identity}"


def _greedy(model: nn.Module, tokenizer: Any, text: str, steering: Steering, count: int = NEW_TOKENS) -> str:
    """The text of `_greedy_ids`, without its end token."""
    ends, ids = ends_of(model, tokenizer), _greedy_ids(model, tokenizer, text, steering, count)
    return decode(tokenizer, [token for token in ids if token not in ends])


def _greedy_ids(
    model: nn.Module, tokenizer: Any, text: str, steering: Steering | None, count: int = NEW_TOKENS
) -> list[int]:
    """Greedy decoding of one prompt without a cache: the whole text is read again for every token."""
    ids = _ids(model, tokenizer, text)
    start = ids.shape[1]
    ends = ends_of(model, tokenizer)
    steered = contextlib.nullcontext() if steering is None else steering.on(model, prompt_length=start)
    with torch.inference_mode(), running(model), steered:
        while ids.shape[1] < start + count:
            token = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
            if int(token) in ends:
                break
    return [int(token) for token in ids[0, start:]]


def _ids(model: nn.Module, tokenizer: Any, text: str) -> Tensor:
    return torch.tensor([encode_prompt(tokenizer, text)], device=device_of(model))


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode(), running(model):
        return model(input_ids=ids, use_cache=False).logits


def _direction(model: nn.Module, seed: int = 0) -> SteeringVector:
    """A fixed standard normal vector at the middle layer."""
    blocks = find_blocks(model)
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({len(blocks) // 2: torch.randn(blocks.d_model, generator=generator)})


def _direction_at(model: nn.Module, site: str, layer: int, value: Tensor) -> SteeringVector:
    """A fixed random vector at a place, of the mean norm of the value there, `[pos, width]`."""
    direction = torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(0))
    norm = float(value[1:].norm(dim=-1).mean())  # position 0 is an attention sink
    return SteeringVector({layer: direction * (norm or 1.0) / direction.norm()}, site=site)


def _coefficient_of_stream_norm(model: nn.Module, tokenizer: Any) -> float:
    """The coefficient that gives `_direction` the mean norm of the stream at its layer, so that the text changes."""
    ((layer, vector),) = _direction(model).layers.items()
    with capture_resid(model, layer) as streams:
        _logits(model, _ids(model, tokenizer, TEXTS[1]))
    norms = streams[layer][0, 1:].float().norm(dim=-1)  # position 0 is an attention sink
    return float(norms.mean() / vector.norm())


def _relative_difference(measured: Tensor, reference: Tensor) -> float:
    """`|measured - reference| / |reference|`, in float32; infinite, and so never within a tolerance, if a value is not
    finite.
    """
    found = float((measured.float() - reference.float()).norm() / reference.float().norm().clamp_min(1e-30))
    return math.inf if math.isnan(found) else found


def _tolerance(model: nn.Module) -> float:
    dtype = next(unwrap(model).parameters()).dtype
    return 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
