from __future__ import annotations

import pytest
import torch

import steerkit as sk
from steerkit.models.identity import fingerprint
from steerkit.steering.steering import Steering
from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import pad
from steerkit.vectors.vector import SteeringVector
from tests.capture.test_capture import hooks, relative
from tests.reference import greedy, hidden_states, steered_logits
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

PROMPTS = ["Hello", "A rather longer prompt than that", "x = 1; y = 2", "?"]


def vector(model, *layers: int, seed: int = 0, size: float = 4.0) -> SteeringVector:
    width = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: size * torch.randn(width, generator=generator) for layer in layers or (1,)})


def plain_generate(model, tokenizer, steering: Steering | None, new: int, **options) -> list[list[int]]:
    """transformers' own generate on the left-padded batch."""
    ids, mask, _ = pad([encode_prompt(tokenizer, p) for p in PROMPTS], "left")
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **options}
    if steering is None:
        out = model.generate(input_ids=ids, attention_mask=mask, **settings)
    else:
        with steering.on(model):
            out = model.generate(input_ids=ids, attention_mask=mask, **settings)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("positions", ["generated", "from_last_prompt_token", "prompt", "all", "generated:3"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_cached_uncached_batched_and_one_at_a_time_agree_token_for_token(kind: str, positions: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    new = 10
    steering = Steering(vector(model, 1, 2), coefficient=1.5, positions=positions, layer="all")
    cached = plain_generate(model, tokenizer, steering, new, eos_token_id=None)
    uncached = plain_generate(model, tokenizer, steering, new, eos_token_id=None, use_cache=False)
    ours = sk.generate(model, _without_end(tokenizer), PROMPTS, max_new_tokens=new, steering=steering)
    slow = []
    for prompt in PROMPTS:
        ids = encode_prompt(tokenizer, prompt)
        first, stop = {
            "generated": (len(ids), 10**9),
            "from_last_prompt_token": (len(ids) - 1, 10**9),
            "prompt": (0, len(ids)),
            "all": (0, 10**9),
            "generated:3": (len(ids), len(ids) + 3),
        }[positions]
        slow.append(greedy(model, ids, new, (), dict(steering.vector.layers), 1.5, first, stop))
    unsteered = plain_generate(model, tokenizer, None, new, eos_token_id=None)
    assert cached == uncached == slow
    assert ours == [tokenizer.decode(ids, skip_special_tokens=True) for ids in slow]
    assert sum(a != b for a, b in zip(cached, unsteered, strict=True)) >= 3


def _without_end(tokenizer):
    """The same tokenizer in new clothes, without an end-of-sequence token."""
    other = tiny_tokenizer()
    other.eos_token = None
    return other


def test_left_padding_moves_no_steered_stream(llama) -> None:
    model, tokenizer = llama
    steering = Steering(vector(model, 0, 2), positions="prompt", layer="all")
    rows = [encode_prompt(tokenizer, p) for p in PROMPTS]
    ids, mask, positions = pad(rows, "left")
    with torch.no_grad(), steering.on(model):
        padded = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, tokens in enumerate(rows):
        slow = steered_logits(model, tokens, dict(steering.vector.layers), 1.0, range(len(tokens)))
        assert relative(slow, padded[row, -len(tokens) :]) < 1e-5
        assert relative(slow, plain[row, -len(tokens) :]) > 1e-2


def test_coefficient_zero_is_the_unsteered_model_bit_for_bit(llama) -> None:
    model, tokenizer = llama
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[1])])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        for operation in ("add", "ablate"):
            with Steering(vector(model, 0, 1, 2, 3), 0.0, "all", operation, layer="all").on(model):
                assert torch.equal(model(input_ids=ids).logits, plain)
        with Steering(vector(model, 0), 1.0, "all").on(model):
            assert not torch.equal(model(input_ids=ids).logits, plain)


def test_each_row_has_its_own_coefficient(llama) -> None:
    model, tokenizer = llama
    coefficients = torch.tensor([0.0, 0.25, -0.25, 0.6])
    steering = Steering(vector(model, 1), coefficients, "from_last_prompt_token")
    together = sk.generate(model, tokenizer, ["Hello"] * 4, max_new_tokens=8, steering=steering)
    alone = [
        sk.generate(
            model,
            tokenizer,
            ["Hello"],
            max_new_tokens=8,
            steering=Steering(vector(model, 1), float(c), "from_last_prompt_token"),
        )[0]
        for c in coefficients
    ]
    assert together == alone
    assert len(set(together)) >= 3
    with pytest.raises(ValueError, match="one coefficient per row, 3; got 4"):
        sk.generate(model, tokenizer, ["a", "b", "c"], max_new_tokens=1, steering=steering)


def test_different_vectors_layers_and_operations_share_a_batch(llama) -> None:
    model, tokenizer = llama
    steerings = [
        Steering(vector(model, 1, seed=1), 1.0, "generated"),
        None,
        Steering(vector(model, 0, 3, seed=2), -1.0, "all", layer="all"),
        Steering(vector(model, 2, seed=3), 1.0, "from_last_prompt_token", "ablate"),
        Steering(vector(model, 1, seed=4), 2.0, "prompt"),
    ]
    prompts = ["Hello", "Hello", "Hello", "Hello there", "Hello"]
    together = sk.generate(model, tokenizer, prompts, max_new_tokens=9, steering=steerings)
    alone = [
        sk.generate(model, tokenizer, [p], max_new_tokens=9, steering=s)[0]
        for p, s in zip(prompts, steerings, strict=True)
    ]
    assert together == alone
    assert len(set(together)) >= 4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ablation_leaves_no_component_along_the_direction(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    ablated = vector(model, 0, 1, 2)
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[1])])
    with torch.no_grad(), sk.capture_resid(model) as before:
        model(input_ids=ids)
    with (
        torch.no_grad(),
        Steering(ablated, 1.0, "all+0", "ablate", layer="all").on(model),
        sk.capture_resid(model) as after,
    ):
        model(input_ids=ids)
    for layer, direction in ablated.unit().layers.items():
        assert float((before[layer] @ direction).abs().max()) > 0.05
        assert float((after[layer] @ direction).abs().max()) < 1e-5


SPARED = {"all": (1, 10**9), "all+0": (0, 10**9), "all:3": (1, 4), "all+0:2": (0, 2), "prompt": (1, None)}


@pytest.mark.parametrize("positions", SPARED)
def test_an_ablation_spares_position_0_unless_asked_with_and_without_cache_and_padding(llama, positions: str) -> None:
    model, tokenizer = llama
    steering = Steering(vector(model, 0, 1, 2), 1.0, positions, "ablate", layer="all")
    slow = []
    for prompt in PROMPTS:
        ids = encode_prompt(tokenizer, prompt)
        first, stop = SPARED[positions]
        stop = len(ids) if stop is None else stop
        slow.append(greedy(model, ids, 8, (), dict(steering.vector.layers), 1.0, first, stop, ablate=True))
    assert plain_generate(model, tokenizer, steering, 8, eos_token_id=None) == slow
    assert plain_generate(model, tokenizer, steering, 8, eos_token_id=None, use_cache=False) == slow
    ours = sk.generate(model, _without_end(tokenizer), PROMPTS, max_new_tokens=8, steering=steering)
    assert ours == [tokenizer.decode(ids, skip_special_tokens=True) for ids in slow]


def test_the_stream_of_position_0_stays_under_an_ablation_and_only_under_an_ablation(llama) -> None:
    model, tokenizer = llama
    rows = [encode_prompt(tokenizer, p) for p in PROMPTS[:2]]
    ids, mask, places = pad(rows, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}

    def first_streams(positions: str, operation: str) -> list[torch.Tensor]:
        steering = Steering(vector(model, 0, 1, 2), 1.0, positions, operation, layer="all")
        with torch.no_grad(), steering.on(model), sk.capture_resid(model, 2) as streams:
            model(**inputs)
        return [streams[2][row, -len(tokens)] for row, tokens in enumerate(rows)]

    with torch.no_grad(), sk.capture_resid(model, 2) as plain:
        model(**inputs)
    for row, tokens in enumerate(rows):
        stream = plain[2][row, -len(tokens)]
        for positions in ("all", "prompt"):
            assert relative(stream, first_streams(positions, "ablate")[row]) < 1e-5
            assert relative(stream, first_streams(positions, "add")[row]) > 1e-2
        assert relative(stream, first_streams("all+0", "ablate")[row]) > 1e-2
        assert torch.equal(first_streams("all+0", "add")[row], first_streams("all", "add")[row])
    with pytest.raises(ValueError, match="'\\+0' after 'prompt' or 'all'"):
        Steering(vector(model, 1), 1.0, "generated+0", "ablate")


def test_steering_adds_exactly_the_vector_where_it_was_read(llama) -> None:
    model, tokenizer = llama
    v = vector(model, 2)
    ids = encode_prompt(tokenizer, PROMPTS[1])
    with torch.no_grad(), sk.capture_resid(model, 2) as plain:
        model(input_ids=torch.tensor([ids]))
    with torch.no_grad(), Steering(v, 0.5, "all").on(model), sk.capture_resid(model, 2) as steered:
        model(input_ids=torch.tensor([ids]))
    assert torch.allclose(steered[2] - plain[2], (0.5 * v.layers[2]).expand_as(plain[2]), atol=1e-5)


def test_transformers_own_hidden_states_see_the_steering_even_after_they_were_asked_for_before(llama) -> None:
    model, tokenizer = llama
    ids = encode_prompt(tokenizer, "Hello")
    plain = hidden_states(model, ids)
    with Steering(vector(model, 1), 1.0, "all").on(model):
        steered = hidden_states(model, ids)
    assert relative(plain[2], steered[2]) > 0.1
    assert torch.equal(plain[1], steered[1])


def test_generate_takes_over_what_is_on_and_equals_its_argument() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    steering = Steering(vector(model, 1), 1.5, "from_last_prompt_token")
    with steering.on(model):
        inside = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert inside == sk.generate(model, tokenizer, PROMPTS, max_new_tokens=8, steering=steering)
    assert inside != sk.generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert hooks(model) == 0


def test_two_steerings_at_once_are_the_sum_of_their_vectors(llama) -> None:
    model, tokenizer = llama
    one, two = vector(model, 1, seed=1), vector(model, 1, seed=2)
    with Steering(one, 1.0).on(model), Steering(two, -0.5).on(model):
        nested = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=8)
        plain = plain_generate(model, tokenizer, None, 8, eos_token_id=None)
    summed = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=8, steering=Steering(one + two * -0.5))
    assert nested == summed
    with Steering(one + two * -0.5).on(model):
        assert plain == plain_generate(model, tokenizer, None, 8, eos_token_id=None)


def test_no_hook_is_left_after_an_exception_half_way() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ZeroDivisionError), Steering(vector(model, 0, 1), layer="all").on(model):
        assert hooks(model) == 5
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), Steering(vector(model, 0, 1), layer="all").on(model):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="layer from 0 to 3"), Steering(vector(model, 1, 9), layer="all").on(model):
        pass
    broken = model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sk.generate(model, tokenizer, PROMPTS, max_new_tokens=2, steering=Steering(vector(model, 0)))
    broken.remove()
    assert hooks(model) == 0


def test_a_told_prompt_length_steers_the_rest_of_one_forward(llama) -> None:
    model, _ = llama
    v = vector(model, 1)
    ids = list(range(3, 15))
    with torch.no_grad(), Steering(v, 1.0, "generated").on(model, prompt_length=8):
        told = model(input_ids=torch.tensor([ids])).logits[0]
    assert relative(steered_logits(model, ids, dict(v.layers), 1.0, range(8, 12)), told) < 1e-5
    with torch.no_grad():
        assert relative(model(input_ids=torch.tensor([ids])).logits[0][8:], told[8:]) > 1e-2


def test_a_second_sequence_inside_one_with_begins_a_prompt_of_its_own(llama) -> None:
    model, tokenizer = llama
    steering = Steering(vector(model, 1), 2.0)
    with steering.on(model):
        first = [plain_generate(model, tokenizer, None, 6, use_cache=cache) for cache in (True, False, True, False)]
    assert first[0] == first[1] == first[2] == first[3] == plain_generate(model, tokenizer, steering, 6)


def test_a_vector_of_another_width_or_model_is_refused_and_foreign_allows_the_latter(llama) -> None:
    model, tokenizer = llama
    with pytest.raises(ValueError, match="width 32, the model's; got 5"):
        sk.generate(model, tokenizer, ["a"], max_new_tokens=1, steering=Steering(SteeringVector({0: torch.ones(5)})))
    theirs = SteeringVector({0: torch.ones(32)}, {"model_fingerprint": "0" * 16, "checkpoint": "theirs"})
    with pytest.raises(ValueError, match=r"theirs.*foreign=True"):
        sk.generate(model, tokenizer, ["a"], max_new_tokens=1, steering=Steering(theirs))
    sk.generate(model, tokenizer, ["a"], max_new_tokens=1, steering=Steering(theirs, foreign=True))


def test_the_fingerprint_follows_the_weights_and_not_their_dtype() -> None:
    one, two = tiny_model(seed=0), tiny_model(seed=1)
    assert fingerprint(one) == fingerprint(tiny_model(seed=0))
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one.to(torch.bfloat16)) == fingerprint(tiny_model(seed=0))


def test_half_precision_models_take_single_precision_vectors() -> None:
    model, tokenizer = tiny_model().to(torch.bfloat16), tiny_tokenizer()
    v = vector(model, 1)
    plain = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    for operation in ("add", "ablate"):
        steering = Steering(v, 2.0, "from_last_prompt_token", operation)
        assert sk.generate(model, tokenizer, PROMPTS, max_new_tokens=6, steering=steering) != plain
