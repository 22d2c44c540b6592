"""Contrasts: right and wrong answers, both orders, the paper's pairs, personas in any template."""

import collections

import jinja2
import pytest

from reptune_jax.data import behavior, contrast
from reptune_jax.data.schema import select

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DROPS = "{% set messages = messages | selectattr('role', 'ne', 'system') | list %}"


class Templated:
    """The part of a tokenizer that chat texts need."""

    def __init__(self, template):
        self.chat_template, self.added_tokens_decoder = template, {}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, chat_template):
        def refuse(message):
            raise jinja2.TemplateError(message)

        template = jinja2.Environment().from_string(chat_template)
        return template.render(
            messages=messages, add_generation_prompt=add_generation_prompt, raise_exception=refuse
        )


@pytest.fixture(scope="module")
def items():
    return behavior.load("honesty").items


@pytest.fixture(scope="module")
def claims(items):
    return select(items, split="test", format="claim")


def shown(c):
    """What the option with each letter says, read from the prompt as a model would."""
    lines = c.messages[-1]["content"].split("\n")
    return {line[1]: line[4:] for line in lines if line[:4] in (" A) ", " B) ")}


@pytest.mark.parametrize("template,words", [("truefalse", "True False"), ("yesno", "Yes No")])
def test_verdict_words(claims, template, words):
    yes, no = words.split()
    made = contrast.claim_prompts(claims, template)
    assert [c.item for c in made] == claims
    for c in made:
        assert (c.pos, c.neg) == ((yes, no) if c.label else (no, yes))
        assert (c.template, c.order, c.label) == (template, "", c.item.label)
        [turn] = c.messages
        assert turn["role"] == "user" and f'"{c.item.text}"' in turn["content"]
        assert turn["content"].endswith("\nAnswer:")


@pytest.mark.parametrize("constant", ["True", "False"])
def test_a_constant_verdict_is_right_half_the_time(claims, constant):
    made = contrast.claim_prompts(claims, "truefalse")
    assert sum(c.pos == constant for c in made) * 2 == len(made)


def test_lettered_claims_point_at_the_right_verdict(claims):
    made = contrast.claim_prompts(claims, "lettered")
    assert len(made) == 2 * len(claims)
    for c in made:
        options = shown(c)
        assert options[c.pos] == ("True" if c.item.label else "False")
        assert options[c.neg] == ("False" if c.item.label else "True")
        assert options["A"] == ("True" if c.order == "ab" else "False")


def test_lettered_is_the_papers_text(claims):
    first = contrast.claim_prompts(claims[:1], "lettered")[0]
    assert first.messages == [
        {
            "role": "user",
            "content": "Question: Is the following claim true or false? "
            f'"{claims[0].text}"\n\nChoices:\n A) True\n B) False\n\nAnswer:',
        }
    ]


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_constant_letter_is_right_half_the_time(items, claims, letter):
    scenarios = contrast.scenario_prompts(items)
    for made in (contrast.claim_prompts(claims, "lettered"), scenarios):
        assert sum(c.pos == letter for c in made) * 2 == len(made)
        for order in contrast.ORDERS:
            assert sum(c.order == order for c in made) * 2 == len(made)
        per_item = collections.Counter(c.item.id for c in made if c.pos == letter)
        assert set(per_item.values()) == {1}  # not only on average


def test_scenarios_keep_their_incentive_and_point_at_pos(items):
    own = select(items, format="ab")
    made = contrast.scenario_prompts(items)
    assert [c.item.id for c in made] == [i.id for i in own for _ in contrast.ORDERS]
    for c in made:
        assert (shown(c)[c.pos], shown(c)[c.neg]) == (c.item.pos, c.item.neg)
        assert c.messages[:-1] == list(c.item.messages[:-1])
        assert c.messages[-1]["content"].startswith(c.item.messages[-1]["content"])


def test_paired_contrasts_one_claim_under_two_personas(items, claims):
    pairs = contrast.honesty_pairs(claims, items)
    assert [p.item for p in pairs] == claims
    for p in pairs:
        assert p.positive[1:] == p.negative[1:]
        assert p.item.text in p.positive[-1]["content"]
        assert (p.positive_answer, p.negative_answer) == (
            ("A", "B") if p.item.label else ("B", "A")
        )
    for side in ("positive_answer", "negative_answer"):  # letters balanced on both sides
        assert sum(getattr(p, side) == "A" for p in pairs) * 2 == len(pairs)


def test_unpaired_contrasts_one_letter_over_twins(items, claims):
    by_id = {i.id: i for i in claims}
    pairs = contrast.honesty_pairs(claims, items, paired=False)
    assert len(pairs) == len(claims)
    for p in pairs:
        assert p.positive_answer == p.negative_answer == ("A" if p.item.label else "B")
        assert p.item.text in p.positive[-1]["content"]
        assert by_id[p.item.tag("twin")].text in p.negative[-1]["content"]


def test_swapped_pairs_swap_the_letters(items, claims):
    for paired in (True, False):
        ab, ba = (contrast.honesty_pairs(claims, items, paired, order) for order in contrast.ORDERS)
        for one, other in zip(ab, ba, strict=True):
            assert {one.positive_answer, other.positive_answer} == {"A", "B"}
            assert {one.negative_answer, other.negative_answer} == {"A", "B"}


def test_personas_rotate_in_matched_pairs(items, claims):
    matched = contrast.matched_personas(items)
    assert len(matched) == 5
    assert all(h.cluster == d.cluster and (h.label, d.label) == (1, 0) for h, d in matched)
    for i, p in enumerate(contrast.honesty_pairs(claims, items)):
        both = (p.positive[0], p.negative[0])
        assert both == tuple(persona.messages[0] for persona in matched[i % 5])


def test_persona_pairs_put_both_personas_before_a_prompt(items, claims):
    made = contrast.persona_pairs(items, claims[:7], Templated(CHATML))
    matched = contrast.matched_personas(items)
    for i, (positive, negative, prompt) in enumerate(made):
        assert prompt is claims[i]
        for messages, persona in zip((positive, negative), matched[i % 5], strict=True):
            assert messages == [*persona.messages, *prompt.messages]


@pytest.mark.parametrize("template", [REFUSES + CHATML, DROPS + CHATML], ids=["refuses", "drops"])
def test_a_template_without_system_turns_gets_the_persona_anyway(items, claims, template):
    tokenizer = Templated(template)
    [(positive, negative, prompt)] = contrast.persona_pairs(items, claims[:1], tokenizer)
    for messages, persona in zip(
        (positive, negative), contrast.matched_personas(items)[0], strict=True
    ):
        text = contrast.chat_text(tokenizer, messages)
        assert persona.text in text and prompt.text in text
        assert [m["role"] for m in messages] == ["user"]


def test_a_persona_keeps_the_system_turn_that_is_there(items):
    persona = select(items, format="persona")[0]
    dialogue = [{"role": "system", "content": "Sell."}, {"role": "user", "content": "Well?"}]
    assert contrast.with_system(persona, dialogue) == [
        {"role": "system", "content": f"{persona.text}\n\nSell."},
        {"role": "user", "content": "Well?"},
    ]
    assert dialogue[0]["content"] == "Sell."


def test_what_does_not_fit_is_named(items, claims):
    personas = select(items, format="persona")
    with pytest.raises(ValueError, match="template: got 'letter', expected one of truefalse"):
        contrast.claim_prompts(claims, "letter")
    with pytest.raises(ValueError, match="honesty-persona-1-honest: got a persona with label 1"):
        contrast.claim_prompts(personas, "yesno")
    with pytest.raises(ValueError, match=r"its twin 'honesty-.*' is not among the claims"):
        contrast.honesty_pairs(claims[:1], personas, paired=False)
    with pytest.raises(ValueError, match="order: got 'aa', expected one of ab, ba"):
        contrast.honesty_pairs(claims, personas, order="aa")
    with pytest.raises(ValueError, match="personas: got none"):
        contrast.honesty_pairs(claims, claims)
    with pytest.raises(ValueError, match=r"cluster 'honesty-persona-1': got labels \[1\]"):
        contrast.matched_personas(personas[:1])
    with pytest.raises(ValueError, match="a second persona with label 1"):
        contrast.matched_personas([personas[0], personas[0]])
