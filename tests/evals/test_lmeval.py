"""lm-evaluation-harness: our model against its own Hugging Face backend, and against our suites."""

import json
import sys

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import reptune_jax as rt
from reptune_jax import lm
from reptune_jax.evals import lmeval
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.harness import Harness
from reptune_jax.evals.lmeval import Asked
from reptune_jax.evals.suites import readers, scoring
from tests.support import tiny

CLOSE = 1e-4  # nats of a whole continuation, float32 on both sides
PAIRS = [
    ("The weather in the mountains is", " good."),
    ("The answer is: ", "yes, no"),  # the space belongs to what follows
    ("", "Tell me what you think"),
    ("user system assistant\n", "honest"),
]
CUT = ("cut bread", "end a day", "tell a user", "weather", "answer", "think of hills")
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_choice: "{{{{[sol1, sol2]}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def both(request, tmp_path_factory):
    """(ours, theirs, whether text starts with a BOS) of one tiny folder."""
    made = tiny.make_llama(tmp_path_factory.mktemp("harness"), bos=request.param)
    ours = Harness(lm.load(str(made), "float32"), batch=4)
    how = {"device": "cpu", "dtype": "float32", "batch_size": 2}
    # Ours reads what is scored last too.
    return ours, HFLM(pretrained=str(made), max_length=ours.longest - 1, **how), request.param


def asked(kind: str, *each: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(each)]


def test_scores_are_those_of_the_harness_own_backend(both):
    ours, theirs, _ = both
    requests = asked("loglikelihood", *PAIRS)
    want = theirs.loglikelihood(requests, disable_tqdm=True)
    got = ours.loglikelihood(requests, disable_tqdm=True)
    assert [g for _, g in got] == [g for _, g in want]
    assert [logp for logp, _ in got] == pytest.approx([logp for logp, _ in want], abs=CLOSE)


def test_whole_texts_are_scored_in_the_same_windows(both):
    ours, theirs, bos = both
    long = "Tell me what you think of the weather. " * 20
    requests = asked("loglikelihood_rolling", ("A good day.",), (long,))
    assert len(ours.model.tokenizer.encode(long)) > ours.longest
    want = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    got = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    if not bos:  # theirs puts a BOS before the BOS, and scores it
        assert got == pytest.approx(want, abs=CLOSE * 10)
    else:
        ids = ours.model.tokenizer.encode("A good day.")  # with its BOS
        assert got[0] == pytest.approx(ours.model.score_ids([ids], [1])[0][0], abs=CLOSE)


def test_answers_are_the_same_and_stop_at_the_task_s_words(both):
    ours, theirs, _ = both
    how = {"until": [], "max_gen_toks": 12, "do_sample": False}
    free = asked("generate_until", ("The weather", how), ("honest sentence", how))
    want = theirs.generate_until(free, disable_tqdm=True)
    assert ours.generate_until(free, disable_tqdm=True) == want
    stop = want[0][3:5]
    cut = asked("generate_until", ("The weather", how | {"until": [stop]}))
    assert ours.generate_until(cut, disable_tqdm=True) == [want[0].partition(stop)[0]]


def test_chats_are_rendered_as_the_harness_renders_them(both):
    ours, theirs, _ = both
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "It is"}]
    for generate in (True, False):
        want = theirs.apply_chat_template(turns, add_generation_prompt=generate)
        assert ours.apply_chat_template(turns, add_generation_prompt=generate) == want


def test_a_steered_model_is_asked_as_it_is_steered(both):
    ours, _, _ = both
    vector = rt.extract(ours.model, [("A good day.", "A terrible day.")] * 2).at([1]) * 4
    steered = Harness(Condition(ours.model, "steer", steer=vector), batch=4)
    got = steered.loglikelihood(asked("loglikelihood", PAIRS[0]), disable_tqdm=True)
    plain = ours.loglikelihood(asked("loglikelihood", PAIRS[0]), disable_tqdm=True)
    assert got[0][0] == pytest.approx(
        ours.model.loglikelihood(PAIRS[:1], steer=vector)[0][0], abs=CLOSE
    )
    assert abs(got[0][0] - plain[0][0]) > 100 * CLOSE


def test_the_program_agrees_with_our_suites_item_by_item(both, tmp_path, capsys):
    ours, _, _ = both
    data, tasks = tmp_path / "data", tmp_path / "tasks"
    data.mkdir()
    tasks.mkdir()
    file = data / "piqa.jsonl"
    with file.open("w") as out:
        for i, cut in enumerate(CUT):
            row = {"goal": cut, "sol1": "a spoon", "sol2": f"an {cut} and a knife", "label": i % 2}
            out.write(json.dumps(row) + "\n")
    (tasks / "piqa.yaml").write_text(TASK.format(name="mine", file=file))
    asked_ = Asked(("mine",), str(tasks), batch=4)
    folder, to = str(ours.model.files), str(tmp_path / "to")
    found = lmeval.run(folder, asked_, to=to)["model"]
    labels = {"behavior": "none", **ours.cond.labels}
    rows = scoring.rows(ours.cond, labels, readers.read("piqa", str(data)), 4)
    for metric in ("acc", "acc_norm"):
        want = {row.item_id: row.value for row in rows if row.metric == metric}
        got = {f"piqa-{s['doc_id']}": s[metric] for s in found["samples"]["mine"]}
        assert got == want and len(set(got.values())) == 2 and len(got) == len(CUT)
    logp = {row.item_id: (row.logp_pos, row.logp_neg) for row in rows if row.metric == "acc"}
    for sample in found["samples"]["mine"]:
        each = [float(resp[0]) for resp in sample["filtered_resps"]]
        right = each.pop(sample["target"])
        assert (right, *each) == pytest.approx(logp[f"piqa-{sample['doc_id']}"], abs=CLOSE)
    assert "|mine" in capsys.readouterr().out
    stored = json.loads((tmp_path / "to/model.json").read_text())
    assert stored["results"]["mine"]["acc,none"] == found["results"]["mine"]["acc,none"]
    # What is there is not asked again, and is no answer to other questions.
    assert lmeval.run(folder, asked_, to=to)["model"] == stored
    with pytest.raises(ValueError, match="Name another folder with --to"):
        lmeval.run(folder, asked_._replace(limit=2), to=to)
    (tasks / "piqa.yaml").write_text(TASK.format(name="mine", file=file).replace("goal", "sol1"))
    with pytest.raises(ValueError, match="Name another folder with --to"):
        lmeval.run(folder, asked_, to=to)


def test_what_cannot_be_asked_is_said_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--include: got 'nowhere'"):
        lmeval.run("absent", Asked(("mine",), "nowhere"))
    monkeypatch.delattr("reptune_jax.evals.harness")
    monkeypatch.delitem(sys.modules, "reptune_jax.evals.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install .*reptune_jax\[lmeval\]"):
        lmeval.run("absent", Asked(("mine",)))
