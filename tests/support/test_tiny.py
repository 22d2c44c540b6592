"""The tiny models and their tokenizer load in transformers and are not degenerate."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support import tiny


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_model_loads_with_its_weights_and_logits_are_not_degenerate(variant, tmp_path):
    make, overrides = tiny.VARIANTS[variant]
    folder = make(tmp_path, **overrides)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        logits_BxTxV = model(torch.arange(20, 60)[None]).logits
    assert 1.0 < logits_BxTxV.std(-1).mean() < 20.0
    assert logits_BxTxV.argmax(-1).unique().numel() > 10


def test_a_seed_decides_the_weights(tmp_path):
    def weights(seed, name):
        folder = tiny.make_qwen2(tmp_path / name, seed=seed)
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()

    first, same, other = weights(1, "a"), weights(1, "b"), weights(2, "c")
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)


def test_overrides_reach_the_saved_config(tmp_path):
    folder = tiny.make_llama(tmp_path, rope_parameters=tiny.LLAMA3_ROPE, num_hidden_layers=2)
    config = AutoConfig.from_pretrained(folder)
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["original_max_position_embeddings"] == 64
    assert config.num_hidden_layers == 2 and not config.tie_word_embeddings


@pytest.mark.parametrize("text", ["Hello, world!\n\n tabs\tand  spaces", "héllo 你好 🙂 \x00\x7f"])
def test_tokenizer_round_trips_any_text(text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.make_tokenizer(tmp_path))
    assert len(tokenizer) == tiny.VOCAB
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("bos", [False, True])
def test_chat_template_and_special_tokens(bos, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.make_tokenizer(tmp_path, bos=bos))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (tiny.END_ID, tiny.PAD_ID)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (tiny.BOS if bos else "") + (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tiny.START_ID) == 3 and ids.count(tiny.END_ID) == 2
    assert (tokenizer("Hi")["input_ids"][0] == tiny.BOS_ID) == bos
