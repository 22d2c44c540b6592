"""The torch reference is itself held against transformers, closed forms and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from tests.support import tiny
from tests.support import torch_reference as ref


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture
def model(folder):
    return ref.load(folder)


@pytest.fixture
def batch():
    ids = torch.randint(4, tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :1] = 0
    labels, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    labels[:, 6:] = 1
    positions[:, 4:6] = positions[0, 2:4] = 1
    return ref.Batch(ids, mask, labels, positions)


def direction(seed, D=64):
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))


def test_residuals_are_the_hidden_states_of_transformers(model, batch):
    ones = torch.ones_like(batch.ids_BxT)
    residual_NxBxTxD = ref.residuals(model, batch.ids_BxT, ones)
    with torch.no_grad():
        states = model(batch.ids_BxT, output_hidden_states=True).hidden_states
        torch.testing.assert_close(residual_NxBxTxD[:-1], torch.stack(states[1:-1]))
        torch.testing.assert_close(model.model.norm(residual_NxBxTxD[-1]), states[-1])


def test_steering_the_last_block_is_addition_before_the_final_norm(model, batch):
    vector = direction(1)
    steered = ref.steered_logits(model, batch.ids_BxT, batch.mask_BxT, {3: vector})
    residual = ref.residuals(model, batch.ids_BxT, batch.mask_BxT)[-1]
    with torch.no_grad():
        torch.testing.assert_close(steered, model.lm_head(model.model.norm(residual + vector)))
        plain = ref.logits(model, batch.ids_BxT, batch.mask_BxT)
    assert (steered - plain).abs().max() > 0.1


def test_hooks_are_gone_after_use(model, batch):
    with torch.no_grad():
        before = ref.logits(model, batch.ids_BxT, batch.mask_BxT)
        ref.steered_logits(model, batch.ids_BxT, batch.mask_BxT, {0: direction(1)})
        torch.testing.assert_close(ref.logits(model, batch.ids_BxT, batch.mask_BxT), before)


def test_padding_on_the_left_changes_no_real_logit(model, batch):
    with torch.no_grad():
        padded = ref.logits(model, batch.ids_BxT, batch.mask_BxT)[1, 3:]
        alone = ref.logits(model, batch.ids_BxT[1:2, 3:], batch.mask_BxT[1:2, 3:])[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


def test_token_loss_is_that_of_transformers(model, batch):
    ids, mask = batch.ids_BxT, torch.ones_like(batch.ids_BxT)
    labels = ids.masked_fill(batch.label_BxT == 0, -100)
    with torch.no_grad():
        theirs = model(ids, labels=labels).loss
        ours = ref.token_loss(ref.logits(model, ids, mask), ids, batch.label_BxT)
    torch.testing.assert_close(ours, theirs)


def test_soft_targets_are_half_of_each_token(model, batch):
    with torch.no_grad():
        logits = ref.logits(model, batch.ids_BxT, batch.mask_BxT)
        hard = [
            ref.token_loss(logits, torch.full_like(batch.ids_BxT, t), batch.label_BxT)
            for t in (7, 11)
        ]
        soft = ref.token_loss(logits, batch.ids_BxT, batch.label_BxT, soft_ids=(7, 11))
    torch.testing.assert_close(soft, (hard[0] + hard[1]) / 2)


@pytest.mark.parametrize("mode,sign", [("in", 1), ("in", -1), ("out", 1)])
def test_cosine_loss_is_the_mean_over_layers_of_the_mean_over_positions(mode, sign, model, batch):
    directions = {1: direction(1), 2: 5 * direction(2)}
    objective = ref.Objective(directions, sign=sign, mode=mode, w_token=0.0)
    parts, _ = ref.dual_loss(model, batch, objective)
    residual = ref.residuals(model, batch.ids_BxT, batch.mask_BxT)
    expected = []
    for l, d in directions.items():
        cosines = [
            sign * torch.dot(residual[l, b, t], d) / (residual[l, b, t].norm() * d.norm())
            for b, t in batch.position_BxT.nonzero().tolist()
        ]
        per_position = [c.abs() if mode == "out" else (1 - c) / 2 for c in cosines]
        expected.append(torch.stack(per_position).mean())
        torch.testing.assert_close(parts.cos_layers[l], torch.stack(cosines).mean())
    torch.testing.assert_close(parts.total, torch.stack(expected).mean())


def test_kl_is_that_of_torch_and_zero_for_the_base_itself(model, batch):
    with torch.no_grad():
        base = ref.logits(model, batch.ids_BxT, batch.mask_BxT)
        other = ref.steered_logits(model, batch.ids_BxT, batch.mask_BxT, {2: direction(3)})
    real = batch.mask_BxT.bool()
    expected = F.kl_div(
        other[real].log_softmax(-1),
        base[real].log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(ref.kl_to_base(other, base, batch.mask_BxT), expected)
    assert expected > 0.01
    assert ref.kl_to_base(base, base, batch.mask_BxT).item() == pytest.approx(0, abs=1e-6)


def test_gradients_agree_with_finite_differences(model, batch):
    with torch.no_grad():
        base = ref.steered_logits(model, batch.ids_BxT, batch.mask_BxT, {0: 0.3 * direction(9)})
    neutral = ref.Neutral(batch.ids_BxT, batch.mask_BxT, base)
    objective = ref.Objective({1: direction(1), 2: direction(2)}, w_cos=3.0, w_kl=0.5)
    ref.unfreeze(model, [1, 2])
    _, grads = ref.dual_loss(model, batch, objective, neutral)
    assert set(grads) == {
        f"model.layers.{l}.self_attn.{m}"
        for l in (1, 2)
        for m in ("v_proj.weight", "v_proj.bias", "o_proj.weight")
    }
    named = dict(model.named_parameters())
    for name, grad in grads.items():
        step = 0.05 * grad / grad.norm()
        with torch.no_grad():
            named[name].add_(step)
            above = ref.dual_terms(model, batch, objective, neutral).total
            named[name].sub_(2 * step)
            below = ref.dual_terms(model, batch, objective, neutral).total
            named[name].add_(step)
        slope = (above - below).item() / 0.1
        assert slope == pytest.approx(grad.norm().item(), rel=0.02), name


def test_a_parameter_above_the_loss_has_a_zero_gradient(model, batch):
    objective = ref.Objective({1: direction(1)}, w_token=0.0)
    ref.unfreeze(model, [0, 3])
    _, grads = ref.dual_loss(model, batch, objective)
    assert grads["model.layers.3.self_attn.o_proj.weight"].abs().max() == 0
    assert grads["model.layers.0.self_attn.o_proj.weight"].abs().max() > 0


def test_training_lowers_both_losses_and_moves_only_what_was_chosen(model, batch):
    before = {n: p.clone() for n, p in model.named_parameters()}
    objective = ref.Objective({1: direction(1), 2: direction(2)}, w_token=0.1)
    optimizer = ref.adamw(ref.unfreeze(model, [1, 2]), lr=1e-2)
    steps = [ref.train_step(model, optimizer, batch, objective) for _ in range(8)]
    assert steps[-1].token < 0.9 * steps[0].token
    assert steps[-1].cosine < steps[0].cosine - 0.05
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


def test_greedy_is_argmax_one_token_at_a_time(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["Tell me.", "What do you think of the weather in the mountains?"]
    vectors = {1: 2 * direction(4)}
    texts = ref.greedy(model, tokenizer, prompts, max_new_tokens=6, chat=False, vectors=vectors)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(6):
            logits = ref.steered_logits(model, ids, torch.ones_like(ids), vectors)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tiny.END_ID:
                break
        assert text == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert texts != ref.greedy(model, tokenizer, prompts, max_new_tokens=6, chat=False)


def test_chat_prompts_use_the_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = ref.encode(tokenizer, ["Hi", [{"role": "system", "content": "Be brief."}]], chat=True)
    assert tokenizer.decode(inputs["input_ids"][0][inputs["attention_mask"][0].bool()]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]  # padding is on the left
