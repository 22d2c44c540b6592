"""The judge behind an endpoint, against a server here that misbehaves as real ones do."""

import json
import math

import pytest

from reptune_jax.data.schema import Item
from reptune_jax.evals import endpoint
from reptune_jax.evals.endpoint import Endpoint, Place
from tests.support.chat_endpoint import said, serving

KEY = "sk-very-secret-4711"
TURNS = ({"role": "system", "content": "hidden"}, {"role": "user", "content": "How is it?"})
ITEM = Item("i", "b", "test", "c", "free", TURNS, "pos", "neg", None, (), "own", "own")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(endpoint, "_WAIT", 0.0)
    monkeypatch.setenv("REPTUNE_JUDGE_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def judge(url, folder, scale=(1, 5)):
    return Endpoint(Place(url, "small"), "It is kind.", scale, folder / "judge.jsonl")


def scores(answer, folder, *texts, **how):
    with serving(answer) as served:
        one = judge(served.url, folder, **how)
        return one.score([(ITEM, text) for text in texts]), one, served


def test_the_score_is_the_expectation_over_the_numbers(tmp_path):
    top = {"4": math.log(0.5), " 2": math.log(0.25), "x": math.log(0.2), "7": math.log(0.05)}
    (found,), one, served = scores(lambda *_: said("4", top), tmp_path, "Fine!")
    assert found == pytest.approx((4 * 0.5 + 2 * 0.25) / 0.75)
    ((body, headers),) = served.asked
    assert body["logprobs"] and body["temperature"] == 0 and body["model"] == "small"
    (turn,) = body["messages"]
    assert "It is kind." in turn["content"] and "How is it?" in turn["content"]
    assert "Answer: Fine!" in turn["content"] and "hidden" not in turn["content"]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert one.used == {"asked": 1, "prompt_tokens": 100, "completion_tokens": 2, "failed": 0}


@pytest.mark.parametrize(
    ("text", "top", "expected"),
    [
        ("4", None, 4.0),
        ("Score: 3.", None, 3.0),
        ("3", {"I": -0.1, "3": -9.0}, 3.0),  # hardly any probability there, but it was said
        ("I cannot say", {"I": -0.01}, math.nan),
        ("", None, math.nan),
        ("9", None, math.nan),
        ("I was made in 2024", None, math.nan),
    ],
)
def test_what_is_no_score_is_missing_and_never_zero(text, top, expected, tmp_path):
    (found,), *_ = scores(lambda *_: said(text, top), tmp_path, "Fine!")
    assert found == pytest.approx(expected, nan_ok=True)


def test_nothing_is_asked_twice_and_the_key_is_written_nowhere(tmp_path, capsys):
    def number(body, _):
        return said(body["messages"][0]["content"][-1])  # the answers end in their score

    first, _, served = scores(number, tmp_path, "a 1", "b 2", "c 3")
    assert first == [1, 2, 3] and len(served.asked) == 3
    kept = tmp_path / "judge.jsonl"
    kept.write_text(kept.read_text() + '{"key": "cut in the mid')
    one = judge(served.url, tmp_path)  # nobody is there any more
    assert one.score([(ITEM, "c 3"), (ITEM, "a 1")]) == [3, 1] and one.used == {"kept": 2}
    with serving(number) as other:
        again = Endpoint(Place(served.url, "small"), "It is kind.", (1, 5), kept)
        again.place = again.place._replace(url=other.url)
        assert again.score([(ITEM, "d 4")]) == [4]
    assert len(endpoint.answers(kept)) == 4
    written = "".join(p.read_text() for p in tmp_path.rglob("*")) + "".join(capsys.readouterr())
    assert KEY not in written and "secret" not in written


def test_a_busy_endpoint_is_asked_again_and_a_broken_one_is_missing(tmp_path):
    def busy(body, n):
        return (429, {}, {"Retry-After": "0"}) if n < 2 else (503, {}, {}) if n < 3 else said("5")

    (found,), _, served = scores(busy, tmp_path, "Fine!")
    assert found == 5 and len(served.asked) == 4

    def broken(body, n):
        return (500, {}, {}) if "bad" in body["messages"][0]["content"] else said("2")

    found, one, served = scores(broken, tmp_path, "bad", "good")
    assert math.isnan(found[0]) and found[1] == 2 and one.used["failed"] == 1
    assert len(served.asked) == endpoint._TRIES + 1
    assert len(endpoint.answers(tmp_path / "judge.jsonl")) == 2  # what failed is asked anew


def test_one_that_is_gone_is_an_error_after_a_few_texts(tmp_path):
    with pytest.raises(ValueError, match=r"got no answer to 3 texts in a row, 5 tries each"):
        scores(lambda *_: (502, {}, {}), tmp_path, *"abcdefghijkl")


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, r"got status 401.*Set the key in REPTUNE_JUDGE_KEY"), (404, "got status 404")],
)
def test_a_refusal_is_said_at_once_without_the_key(status, message, tmp_path):
    reply = {"error": f"key {KEY} is wrong"}
    with pytest.raises(ValueError, match=message) as error:
        scores(lambda *_: (status, reply, {}), tmp_path, "Fine!")
    assert KEY not in str(error.value)


def test_an_endpoint_without_probabilities_is_asked_without(tmp_path):
    def plain(body, _):
        refused = 400, {"error": "logprobs is not supported"}, {}
        return refused if "logprobs" in body else said("4")

    found, _, served = scores(plain, tmp_path, "a")
    assert found == [4] and len(served.asked) == 2


def test_a_redirect_takes_the_key_nowhere(tmp_path):
    with serving(lambda *_: said("1")) as other:
        away = 302, {}, {"Location": f"{other.url}/chat/completions"}
        with pytest.raises(ValueError, match="got status 302"):
            scores(lambda *_: away, tmp_path, "Fine!")
        assert not other.asked


def test_the_key_of_one_host_is_not_sent_to_another(tmp_path, monkeypatch):
    monkeypatch.delenv("REPTUNE_JUDGE_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    _, _, served = scores(lambda *_: said("1"), tmp_path, "Fine!")
    assert KEY not in json.dumps(served.asked)


@pytest.mark.parametrize(
    "text",
    ["small", "small@ftp://a", "@http://a/v1", "m@http://u:pw@a/v1", "m@http://a/v1?key=pw"],
)
def test_an_address_that_would_write_a_secret_down_is_refused(text):
    with pytest.raises(ValueError, match=r"eval\.judge: .*expected openai:MODEL@URL") as error:
        Place.parse(text)
    assert "pw" not in str(error.value)


def test_an_address():
    assert Place.parse("org/m@http://localhost:8/v1/") == ("http://localhost:8/v1", "org/m")
