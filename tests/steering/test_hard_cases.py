"""Cases in which steering could be silently wrong: each is right here, or refused by name."""

from __future__ import annotations

import contextlib
import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import steerkit as sk
from steerkit.generation.batches import exact
from steerkit.generation.engine import Row
from steerkit.generation.generate import decode
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.io.tables import read_table, write_table
from steerkit.models.blocks import NoResidualStream, find_blocks
from steerkit.models.cache_argument import cache_argument, cache_of
from steerkit.models.identity import fingerprint
from steerkit.models.model import evaluating
from steerkit.scores.fluency import log_probabilities, perplexity
from steerkit.steering.steering import Steering
from steerkit.sweeps.result import FewWarning, SweepResult
from steerkit.text.prompt import Prompt
from steerkit.text.spans import SpannedText, passage_of
from steerkit.text.tokens import encode
from steerkit.text.traces import DebateTrace, Turn
from steerkit.text.turn_contrasts import turn_contrasts
from steerkit.vectors.vector import SteeringVector
from tests import small_models
from tests.reference import greedy
from tests.tiny import LLAMA, tiny_model, tiny_tokenizer

PROMPT = (5, 9, 14, 3, 77, 21, 8)


def push(*layers: int, size: float = 8.0, width: int = 32, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    values = {layer: torch.randn(width, generator=generator) for layer in layers}
    return SteeringVector({layer: size * value / value.norm() for layer, value in values.items()})


def build(kind: str, **more):
    """A random model of some kind, by its configuration's own names."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**LLAMA, **more}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    return model.eval()


def stepwise(model, prompt, new: int, vector: SteeringVector | None = None, start: int | None = None) -> list[int]:
    """Greedy tokens, the whole text forwarded anew for each, with a hook of the test's own from position `start`."""
    ids = list(prompt)

    def hook(_, __, out, value):
        stream = out if isinstance(out, torch.Tensor) else out[0]
        moved = stream.clone()
        moved[:, start:] += value
        return moved if isinstance(out, torch.Tensor) else (moved, *out[1:])

    blocks = find_blocks(model)
    with contextlib.ExitStack() as stack:
        for layer, value in (vector.layers if vector else {}).items():
            handle = blocks.modules[layer].register_forward_hook(lambda *a, v=value: hook(*a, v))
            stack.callback(handle.remove)
        for _ in range(new):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_model_compiled_as_a_whole_is_refused_since_its_hooks_would_not_run() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    find_blocks(model)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="not compiled as a whole"):
        sk.generate(model, tokenizer, ["ab"], max_new_tokens=2, steering=Steering(push(1)))
    with pytest.raises(ValueError, match="not compiled as a whole"), Steering(push(1)).on(model):
        pass
    with pytest.raises(ValueError, match="not compiled as a whole"):
        find_blocks(torch.compile(tiny_model(), backend="eager"))


def test_blocks_compiled_one_by_one_are_steered_as_before() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    one = {"max_new_tokens": 6, "steering": Steering(push(1))}
    before = sk.generate(model, tokenizer, ["ab cd"], **one)
    for block in model.model.layers:
        block.compile(backend="eager")
    assert sk.generate(model, tokenizer, ["ab cd"], **one) == before
    assert before != sk.generate(model, tokenizer, ["ab cd"], max_new_tokens=6)
    torch._dynamo.reset()


def test_layers_taken_out_after_the_first_look_are_noticed() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sk.generate(model, tokenizer, ["ab"], max_new_tokens=1)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="layer from 0 to 1"):
        sk.generate(model, tokenizer, ["ab"], max_new_tokens=1, steering=Steering(push(3)))


MAMBA = {"state_size": 8, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 8}


def test_a_recurrent_model_goes_on_from_its_state_and_its_plain_forwards_know_no_new_tokens() -> None:
    model = build("mamba2", hidden_size=32, num_hidden_layers=2, **MAMBA)
    vector = push(1, size=2.0)
    rows = [Row(prompt, (Steering(vector, 1.0, "from_last_prompt_token"),)) for prompt in (PROMPT, PROMPT[:3])]
    found = [each for batch in decode(model, tiny_tokenizer(), rows, [0, 1], max_new_tokens=6) for each in batch]
    slow = [stepwise(model, row.prompt, 6, vector, len(row.prompt) - 1) for row in rows]
    assert [list(continuation.ids) for _, continuation in sorted(found, key=lambda one: one[0])] == slow
    assert slow != [stepwise(model, row.prompt, 6) for row in rows]
    with pytest.raises(ValueError, match="takes no KV cache"), Steering(push(1)).on(model):
        pass


def test_a_recurrent_model_without_a_cache_to_pass_is_refused_and_not_read_from_its_last_token() -> None:
    config = AutoConfig.for_model("rwkv", vocab_size=260, hidden_size=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert len(find_blocks(model)) == 2  # its stream is found: it is the cache that is refused
    with pytest.raises(ValueError, match="takes none of"):
        list(decode(model, tiny_tokenizer(), [Row(PROMPT)], [0], max_new_tokens=2))
    with pytest.raises(ValueError, match="takes no KV cache"), Steering(push(1)).on(model):
        pass


def test_a_model_that_counts_positions_by_the_column_is_batched_by_length() -> None:
    model = build("bart", decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=64)
    vector = push(1)
    several = (PROMPT, PROMPT[:3], PROMPT[1:], PROMPT[2:5])
    rows = [Row(prompt, (Steering(vector, 1.0, "from_last_prompt_token"),)) for prompt in several]
    batches = list(decode(model, tiny_tokenizer(), rows, range(4), max_new_tokens=6))
    assert not exact(model).padded
    assert sorted(sorted(number for number, _ in batch) for batch in batches) == [[0], [1, 3], [2]]
    found = {number: list(continuation.ids) for batch in batches for number, continuation in batch}
    slow = [stepwise(model, row.prompt, 6, vector, len(row.prompt) - 1) for row in rows]
    assert [found[number] for number in range(4)] == slow
    assert slow != [stepwise(model, row.prompt, 6) for row in rows]


def test_a_model_that_counts_positions_from_another_number_is_left_to_count() -> None:
    model = build("roberta", is_decoder=True, pad_token_id=1, max_position_embeddings=300)
    assert "position_ids" in inspect.signature(model.forward).parameters
    assert not find_blocks(model).positions
    text = "some words"
    found = sk.collect(model, tiny_tokenizer(), [text, "a longer one than that"], position="last").resid[0]
    with torch.no_grad():
        ids = torch.tensor([encode(tiny_tokenizer(), text)])
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(found, torch.stack([state[0, -1] for state in states[1:]]), atol=1e-5, rtol=1e-5)


def test_a_hybrid_model_that_forgets_between_chunks_is_scored_token_by_token() -> None:
    model = build(
        "jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        num_experts_per_tok=1, mamba_d_state=8, mamba_expand=2, use_mamba_kernels=False,
    )  # fmt: skip
    assert not exact(model).chunks
    tokenizer = tiny_tokenizer()
    found = perplexity(model, tokenizer, ["some words before"], ["and these after"])
    ids = torch.tensor([[*encode(tokenizer, "some words before"), *encode(tokenizer, "and these after")]])
    with torch.no_grad():
        scores = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    own = scores[16:-1].gather(-1, ids[0, 17:, None]).mean()
    assert found[0] == pytest.approx(float(torch.exp(-own)), rel=1e-4)


@pytest.mark.parametrize("kind", ["bart", "mamba"])
def test_unusual_models_score_a_batch_of_unequal_texts_as_each_alone(kind: str) -> None:
    model, tokenizer = small_models.build(kind), tiny_tokenizer()
    prompts, texts = ["some words before", "few", "and words"], ["and these after", "one", "no more than that"]
    found = perplexity(model, tokenizer, prompts, texts)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = torch.tensor([[*encode(tokenizer, prompt), *encode(tokenizer, text)]])
        with torch.no_grad():
            scores = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        own = scores[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None]).mean()
        assert found[number] == pytest.approx(float(torch.exp(-own)), rel=1e-4)


def test_plain_models_take_chunks_whole(llama) -> None:
    assert exact(llama[0]).padded and exact(llama[0]).chunks


def test_another_active_adapter_is_another_model(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny_tokenizer()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(tiny_model(), config, adapter_name="first")
    model.add_adapter("second", config)
    model.eval()
    prints = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        prints[name] = fingerprint(model)
    with model.disable_adapter():
        prints["none"] = fingerprint(model)
    assert prints["none"] == fingerprint(tiny_model())
    assert len({adapter for _, adapter in prints.values()}) == 3
    assert len({base for base, _ in prints.values()}) == 1
    model.set_adapter("first")
    sk.sweep(model, tokenizer, push(1), ["Hello"], coefficients=[1], max_new_tokens=4, out=tmp_path)
    model.set_adapter("second")
    with pytest.raises(ConfigurationChanged, match="adapter_fingerprint"):
        sk.sweep(model, tokenizer, push(1), ["Hello"], coefficients=[1], max_new_tokens=4, out=tmp_path)


def test_learnt_prompts_are_refused() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(NoResidualStream, match="learnt prompts"):
        find_blocks(model)


@pytest.mark.parametrize("positions", ["from_last_prompt_token", "prompt", "all:2"])
def test_a_right_padded_batch_is_steered_at_its_own_prompts_end(positions) -> None:
    model = tiny_model()
    short, long = torch.tensor([[5, 9, 14]]), torch.tensor([[7, 3, 2, 8, 11]])
    batch = torch.cat([torch.nn.functional.pad(short, (0, 2)), long])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad(), Steering(push(1), positions=positions).on(model):
        alone = model(input_ids=short).logits[0]
        padded = model(input_ids=batch, attention_mask=mask).logits[0, :3]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(alone, model(input_ids=short).logits[0], atol=1e-3)


def test_two_sequences_stepped_in_turn_are_steered_at_all_their_positions() -> None:
    model = tiny_model()
    prompts = [PROMPT[:3], PROMPT]
    wanted = [greedy(model, prompt, 5, (), dict(push(1).layers), 1.0, first=0) for prompt in prompts]
    name = cache_argument(model)
    tokens: list[list[int]] = [[], []]
    caches = [None, None]
    with torch.no_grad(), Steering(push(1), 1.0, "all").on(model):
        for step in range(5):
            for number in (1, 0):
                ids = torch.tensor([tokens[number][-1:] if step else prompts[number]])
                found = model(input_ids=ids, use_cache=True, **({name: caches[number]} if step else {}))
                caches[number] = cache_of(found)
                tokens[number].append(int(found.logits[0, -1].argmax()))
    assert tokens == wanted
    assert wanted[0] != greedy(model, prompts[0], 5)


def test_beams_are_steered_alike_with_and_without_a_cache() -> None:
    model = tiny_model()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.tensor([PROMPT])
    with Steering(push(1)).on(model):
        cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, model.generate(ids, **options))


def test_independent_forwards_of_growing_length_are_prompts_each() -> None:
    model = tiny_model()
    with torch.no_grad():
        with Steering(push(1), positions="prompt").on(model):
            model(input_ids=torch.tensor([PROMPT[:6]]))
            after = model(input_ids=torch.tensor([PROMPT])).logits
        with Steering(push(1), positions="prompt").on(model):
            alone = model(input_ids=torch.tensor([PROMPT])).logits
    assert torch.equal(after, alone)


@pytest.mark.parametrize("name", ["sample", "layer", "text", "seed", "relative_dose"])
def test_a_prompt_row_that_names_a_column_of_the_sweep_is_refused(llama, name) -> None:
    with pytest.raises(ValueError, match=f"expected column names .*{name}"):
        sk.sweep(*llama, push(1), [{"prompt": "ab", name: 1}], coefficients=[1], max_new_tokens=1)


def test_a_group_of_none_is_the_prompts_own(llama) -> None:
    rows = [{"prompt": text, "group": None} for text in ("ab", "cd")]
    table = sk.sweep(*llama, push(1), rows, coefficients=[1], max_new_tokens=1).table
    assert set(table["group"]) == {"0", "1"}


def test_a_sweep_refuses_to_run_inside_another_steering(llama) -> None:
    model, tokenizer = llama
    with Steering(push(1)).on(model), pytest.raises(ValueError, match="no active steering during a sweep"):
        sk.sweep(model, tokenizer, push(1), ["ab"], coefficients=[1], max_new_tokens=1)


def test_a_direction_that_is_zero_cannot_be_ablated_and_an_ablation_has_no_dose(llama) -> None:
    with pytest.raises(ValueError, match="zero at layers"):
        Steering(SteeringVector({1: torch.zeros(32)}), operation="ablate")
    table = sk.sweep(*llama, push(1), ["ab"], coefficients=[1], operation="ablate", max_new_tokens=2).table
    assert table["relative_dose"].isna().all()


def space_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    letters = "\u2581abcdefghijklmnopqrstuvwxyz.:^HW"
    core = Tokenizer(token_models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_pieces_get_no_space_that_the_text_has_not(scheme) -> None:
    tokenizer = space_tokenizer(scheme)
    passage = passage_of(tokenizer, SpannedText("Hello World again", ((6, 9), (9, 11))), "g")
    whole = tokenizer("Hello World again", add_special_tokens=False)["input_ids"]
    assert list(passage.ids) == whole
    read = ["".join(tokenizer.convert_ids_to_tokens(list(passage.ids[a:b]))) for a, b in passage.spans]
    assert read == ["Wor", "ld"]


def test_the_tokenizers_first_token_is_written_once_and_read_never() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    plain = passage_of(tokenizer, "ab cd", "g")
    assert plain.ids[0] == tokenizer.bos_token_id
    assert plain.spans == ((1, 6),)
    for text, lead in (("ab cd", 1), ("<s>ab cd", 1), (Prompt(plain.ids[1:], "ab cd", "chat"), 0)):
        start = len(str(text)) - 2
        spanned = passage_of(tokenizer, SpannedText(text, ((start, start + 2),), cut="whole"), "g")
        assert len(spanned.ids) == 5 + lead
        ((a, b),) = spanned.spans
        assert tokenizer.decode(spanned.ids[a:b]) == "cd"


def test_kl_refuses_other_vectors_than_the_sweeps(llama) -> None:
    result = sk.sweep(*llama, push(1), ["ab cd"], coefficients=[1.0], max_new_tokens=3)
    model, tokenizer = llama
    result.score("kl", model=model, tokenizer=tokenizer, vectors=push(1))
    with pytest.raises(ValueError, match="vectors that the sweep was run with"):
        result.score("kl", model=model, tokenizer=tokenizer, vectors=push(1) * 10)


def test_a_sweep_is_not_resumed_with_another_end_of_sequence(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sk.sweep(model, tokenizer, push(1), ["ab"], coefficients=[1], max_new_tokens=2, out=tmp_path)
    model.generation_config.eos_token_id = [256, 7]
    with pytest.raises(ConfigurationChanged, match="ends"):
        sk.sweep(model, tokenizer, push(1), ["ab"], coefficients=[1], max_new_tokens=2, out=tmp_path)


def test_a_text_longer_than_the_context_is_not_scored(llama) -> None:
    with pytest.raises(ValueError, match="context of 256"):
        perplexity(*llama, ["a" * 200], ["b" * 90])


def test_scores_are_ordinary_tensors_and_a_rendered_prompt_is_not_a_plain_one() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    model.resize_token_embeddings(len(tokenizer))
    bare = Prompt(tokenizer("ab", add_special_tokens=False)["input_ids"], "ab")
    plain, rendered = log_probabilities(model, tokenizer, ["ab", bare], ["cd", "cd"])
    assert not torch.allclose(plain, rendered, atol=1e-3)
    plain += 1  # an inference tensor would refuse
    assert not plain.is_inference()


def test_a_missing_score_is_counted_in_the_area_and_a_gain_without_scores_keeps_its_row() -> None:
    rows = [
        {"vector": "v", "layer": 1, "coefficient": c, "prompt_id": str(p), "group": str(p), "sample": 0, "text": "a",
         "s": np.nan if (c == 2 and p < 3) or c == 3 else float(p)}
        for c in (0.0, 1.0, 2.0, 3.0) for p in range(8)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    area = SweepResult(table[table["coefficient"] < 3]).curve_auc("s").iloc[0]
    assert (area["n_missing"], area["n"]) == (3, 5)
    assert area["curve_auc"] == pytest.approx(2 * np.mean([3, 4, 5, 6, 7]))
    with pytest.warns(FewWarning, match="3 prompts of 'v' at layer 1, coefficient 2 have none"):
        gain = SweepResult(table).gain("s").set_index("coefficient")
    assert list(gain.index) == [1.0, 2.0, 3.0]
    assert np.isnan(gain.loc[3.0, "gain"])


def test_texts_come_back_from_csv_as_they_were(tmp_path) -> None:
    texts = ["None", "nan", "", "12", 'a,b\n"c"', "01"]
    table = pd.DataFrame({"text": texts, "x": [1.0, np.nan, 2, 3, 4, 5]})
    write_table(tmp_path / "t.csv", table, {})
    back, _ = read_table(tmp_path / "t.csv")
    assert back["text"].tolist() == texts
    assert back["x"].isna().tolist() == [False, True, False, False, False, False]


def test_numbers_of_numpy_and_torch_are_numbers(llama) -> None:
    model, tokenizer = llama
    steering = Steering(push(1), np.float32(2.0))
    assert steering.coefficient == 2.0
    assert Steering(push(1), torch.tensor(2.0)).coefficient == 2.0
    assert sk.collect(model, tokenizer, ["ab"], layers=np.int64(1)).layers == (1,)
    assert sk.collect(model, tokenizer, ["ab"], layers=np.arange(2)).layers == (0, 1)
    assert len(sk.generate(model, tokenizer, ["ab"], max_new_tokens=np.int64(2))) == 1


def test_a_vector_does_not_change_with_the_tensor_it_was_made_of() -> None:
    value = torch.ones(4)
    vector = SteeringVector({0: value})
    value.zero_()
    assert vector.norms() == {0: 2.0}


def test_a_frozen_block_stays_in_eval_mode() -> None:
    model = tiny_model().train()
    model.model.layers[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[1].training


def test_a_question_that_quotes_the_tags_does_not_shift_a_turns_context() -> None:
    turns = [Turn(1, 1, "one"), Turn(2, 1, "two")]
    trace = DebateTrace.of("What is <|Round 1 - Initial Solutions|> <|Agent 2 Solution|>?", turns, "x")
    assert turn_contrasts(trace, 1)[1].context.endswith("<|Agent 1 Solution|>: one\n\n<|Agent 2 Solution|>")
