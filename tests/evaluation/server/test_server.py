"""A server as the model: the numbers of the model itself, one line for all that goes wrong, and resumed runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longrope.data.books import read_book
from longrope.errors import LongRopeError
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.results import EvalResults
from longrope.evaluation.run import evaluate, log_path
from longrope.evaluation.server.client import Server
from longrope.evaluation.server.config import ServerOptions
from longrope.export.config import ExportConfig
from longrope.export.export import export_checkpoint
from longrope.models.config import LoadOptions
from longrope.rope.closed_form_scalings import yarn
from longrope.rope.scaling import RopeScaling
from tests.evaluation.embedded import geometry, tiny_tokenizer
from tests.evaluation.server.stand_in import StandIn, serving

SMALL = EvalConfig(samples=2, trials=2, depths=2, ruler_tasks=("niah_single_1",))
SUITES = ("perplexity", "passkey", "needle", "ruler")
ONCE = ServerOptions(retries=0, concurrency=2)


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
def address(stand_in: StandIn) -> Iterator[str]:
    with serving(stand_in) as found:
        yield found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text(read_book("les-miserables").text[50_000:110_000], "utf-8")
    return str(path)


def ask(address: str, text: str, **more: Any) -> EvalResults:
    options: dict[str, Any] = {"suites": SUITES, "lengths": [192, 256], "config": SMALL, "server": ONCE}
    return evaluate(address, **({"tokenizer": "tiny", "data": text} | options | more))


def test_the_numbers_are_those_of_the_model_itself(stand_in: StandIn, address: str, text: str) -> None:
    served = ask(address, text)
    local = evaluate("tiny", data=text, suites=SUITES, lengths=[192, 256], config=SMALL)
    kept = [row for row in local.rows if row.metric != "answer_logprob" and row.detail.get("rule") != "relative"]
    assert [(row.suite, row.length, row.metric, row.detail) for row in served.rows] == [
        (row.suite, row.length, row.metric, row.detail) for row in kept
    ]
    for ours, theirs in zip(served.rows, kept, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-5), ours
    assert served.settings["samples_sha256"] == local.settings["samples_sha256"]
    assert {row.scaling for row in served.rows} == {"tiny"}
    assert served.settings["tokenizer_compared"] is True
    assert max(len(body["prompt"]) + body["max_tokens"] for body in stand_in.asked if not body.get("echo")) == 256


def test_a_real_llama_cpp_server_gives_the_replies_of_the_model(tmp_path: Path, text: str) -> None:
    from tests.export.gguf.llama_cpp import serve

    file = tmp_path / "tiny.gguf"
    factors = yarn(geometry(), 512).windows[-1].factors
    scaling = RopeScaling.extended(
        geometry(), 512, factors, attention_factor=1.0
    )  # two windows: the original one first
    export_checkpoint("tiny", scaling, file, config=ExportConfig(target="gguf"))
    short = serve(file, 256)  # it ends when the object does
    served = ask(short.listening_address, text, suites=("passkey", "needle"), lengths=[256])
    local = evaluate("tiny", data=text, suites=("passkey", "needle"), lengths=[256], config=SMALL)
    accuracies = [row.value for row in local.rows if row.metric == "accuracy"]
    assert [row.value for row in served.rows] == accuracies
    assert max(accuracies) > 0.0
    with pytest.raises(LongRopeError, match="gives no log-probabilities of a prompt"):
        ask(short.listening_address, text, suites="perplexity", lengths=[128])


def test_a_run_goes_on_with_its_finished_tasks(stand_in: StandIn, address: str, text: str, tmp_path: Path) -> None:
    whole = ask(address, text, suites="passkey", output=tmp_path / "whole.json")
    stand_in.failures = [None, None, *[(400, {"error": "no"})] * 2]
    output = tmp_path / "eval.json"
    with pytest.raises(LongRopeError, match="refused a prompt of"):
        ask(address, text, suites="passkey", output=output)
    assert not output.exists()
    assert len(log_path(output).read_text().splitlines()) == 2  # the header and the first length
    before, stand_in.failures = len(stand_in.asked), []
    resumed = ask(address, text, suites="passkey", output=output, resume=True)
    assert len(stand_in.asked) == before + SMALL.trials
    assert resumed.rows == whole.rows
    assert json.loads(output.read_text())["settings"]["server"] == f"{address}/v1"


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, {"error": {"message": "maximum context\nlength is 128"}}, "(400): maximum context length is 128"),
        (400, {"message": "too long"}, "(400): too long"),
        (422, {"detail": "prompt must be text"}, "(422): prompt must be text"),
        (500, "<html>gone</html>", "(500): "),
        (200, "<html>hello</html>", "does not speak OpenAI's completions"),
        (200, {"choices": []}, "gave no reply"),
        (200, {}, "gave no reply"),
    ],
)
def test_an_answer_that_is_none_is_one_line(
    stand_in: StandIn, address: str, text: str, status: int, body: Any, said: str
) -> None:
    stand_in.failures = [(status, body)] * 8
    with pytest.raises(LongRopeError) as caught:
        ask(address, text, suites="passkey", lengths=[256])
    assert said in str(caught.value)
    assert caught.value.code == "server-error"
    assert "\n" not in str(caught.value)


def test_a_busy_server_is_asked_again(stand_in: StandIn, address: str, text: str) -> None:
    stand_in.failures = [(503, {"error": "busy"})]
    patient = ServerOptions(retries=2, concurrency=1)
    assert ask(address, text, suites="passkey", lengths=[256], server=patient).rows[0].trials == SMALL.trials
    assert len(stand_in.asked) == SMALL.trials + 1


def test_perplexity_needs_log_probabilities(stand_in: StandIn, address: str, text: str) -> None:
    stand_in.logprobs = False
    with pytest.raises(LongRopeError, match="gives no log-probabilities of a prompt"):
        ask(address, text, suites="perplexity")


def test_perplexity_of_texts_that_fill_the_context(stand_in: StandIn, address: str, text: str) -> None:
    """vLLM takes no prompt of its whole context, since a token of reply must fit: the last token is asked for apart."""
    stand_in.context = 256
    served = ask(address, text, suites="perplexity")
    local = evaluate("tiny", data=text, suites="perplexity", lengths=[192, 256], config=SMALL)
    assert [row.value for row in served.rows] == pytest.approx([row.value for row in local.rows], rel=1e-5)
    assert max(len(body["prompt"]) for body in stand_in.asked) == 255


def test_a_server_without_the_last_token_is_refused_before_the_first_text(
    stand_in: StandIn, address: str, text: str
) -> None:
    stand_in.context, stand_in.logprob_token_ids = 256, False
    with pytest.raises(LongRopeError, match=r"takes 256 tokens with its reply.*") as caught:
        ask(address, text, suites=("passkey", "perplexity"))
    assert "at 255 tokens" in str(caught.value.hint)
    assert len(stand_in.asked) == 1
    assert len(stand_in.asked[0]["prompt"]) < 64
    assert ask(address, text, suites="perplexity", lengths=[192, 255]).rows


def test_penalties_of_the_served_model_do_not_reach_the_replies(stand_in: StandIn, address: str, text: str) -> None:
    plain = ask(address, text, suites=("passkey", "needle"), lengths=[256])
    assert max(row.value for row in plain.rows) > 0.0
    stand_in.repetition_penalty = 5.0  # of its generation_config.json; Qwen2.5's is 1.05
    assert ask(address, text, suites=("passkey", "needle"), lengths=[256]).rows == plain.rows
    for body in stand_in.asked:
        names = ("temperature", "repetition_penalty", "repeat_penalty", "frequency_penalty", "presence_penalty")
        assert [body[name] for name in names] == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_parameters_that_a_server_refuses_are_left_out(stand_in: StandIn, address: str, text: str) -> None:
    stand_in.unknown = {"repeat_penalty", "repetition_penalty"}
    served = ask(address, text, suites="passkey", lengths=[256], server=ServerOptions(retries=0, concurrency=1))
    assert served.rows[0].trials == SMALL.trials
    assert len(stand_in.asked) == SMALL.trials + 2
    stand_in.unknown = {"temperature"}
    with pytest.raises(LongRopeError, match="Extra inputs are not permitted: temperature"):
        ask(address, text, suites="passkey", lengths=[256])


def test_a_tokenizer_without_a_model_beside_it(address: str, text: str, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    for tokenizer.name_or_path in ("", str(tmp_path), str(tmp_path / "moved")):
        assert ask(address, text, tokenizer=tokenizer, suites="perplexity", lengths=192).rows


def test_what_a_server_cannot_be_asked_is_refused_before_the_first_prompt(
    stand_in: StandIn, address: str, text: str, tmp_path: Path
) -> None:
    for more, said in (
        ({"tokenizer": None}, "needs the `tokenizer` of its model"),
        ({"baselines": ["yarn"]}, "`baselines` has no effect on it"),
        ({"scaling": tmp_path / "scaling.json"}, "`scaling` has no effect on it"),
        ({"load": LoadOptions(dtype="bfloat16")}, "`dtype` has no effect on it"),
        ({"config": SMALL.replace(qa_file=tmp_path / "qa.json")}, "`qa_file` holds the questions"),
        ({"suites": "retention", "lengths": []}, "a server can be measured by perplexity, passkey, needle, ruler"),
        ({"config": SMALL.replace(stride=64)}, "found a `stride`"),
        ({"lengths": [1024]}, "expected lengths of at most 512 tokens, which the server was started for"),
        ({"server": ServerOptions(served_model="other")}, "serves tiny, not other"),
    ):
        with pytest.raises(LongRopeError) as caught:
            ask(address, text, **more)
        assert said in str(caught.value)
    stand_in.models = ["a", "b"]
    with pytest.raises(LongRopeError, match="expected a server with one model, found a, b"):
        ask(address, text)
    assert stand_in.asked == []


def test_another_tokenizer_is_found_out(stand_in: StandIn, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(address, ONCE)
    assert server.check_tokenizer(tiny_tokenizer())
    monkeypatch.setattr("longrope.evaluation.server.client.encode", lambda *_: [1, 2, 3])
    with pytest.raises(LongRopeError, match="cut a text differently"):
        server.check_tokenizer(tiny_tokenizer())
    stand_in.tokenize = False
    assert not server.check_tokenizer(tiny_tokenizer())


def test_tokens_that_could_not_be_compared_are_a_warning(stand_in: StandIn, address: str, text: str) -> None:
    """A server without the question is no fault, and any other answer is not its "does not tell"."""
    stand_in.tokenize = False
    assert "warnings" not in ask(address, text, suites="passkey", lengths=[256]).settings
    stand_in.no_tokens = 401
    settings = ask(address, text, suites="passkey", lengths=[256]).settings
    assert settings["tokenizer_compared"] is False
    (warning,) = settings["warnings"]
    assert warning.startswith("the tokenizer was not compared with the server's: ")
    assert "401" in warning


def test_a_finished_run_is_left_as_it_is(address: str, text: str, tmp_path: Path) -> None:
    output = tmp_path / "eval.json"
    ask(address, text, suites="passkey", lengths=[256], output=output)
    before = output.read_bytes()
    assert {"finished", "seconds"} <= json.loads(before).keys()
    ask(address, text, suites="passkey", lengths=[256], output=output, resume=True)
    assert output.read_bytes() == before
    output.write_bytes(before.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(LongRopeError, match="not what this run came to"):
        ask(address, text, suites="passkey", lengths=[256], output=output, resume=True)


def test_no_server_is_one_line(cli: Any) -> None:
    ran = cli(
        "eval", "http://127.0.0.1:9", "--tokenizer", "tiny", "--suite", "passkey", "--lengths", "256", "--retries", 0
    )
    assert ran.code == 2
    assert ran.err.startswith("longrope: error: no answer from http://127.0.0.1:9/v1")
    assert ran.err.count("\n") == 1
    ran = cli("eval", "tiny", "--suite", "passkey", "--lengths", "256", "--concurrency", 2)
    assert ran.code == 2
    assert "expected the address of a server" in ran.err


def test_the_command_measures_a_server(cli: Any, address: str, text: str, tmp_path: Path) -> None:
    output = tmp_path / "eval.json"
    options = ("--tokenizer", "tiny", "--suite", "passkey", "--lengths", "256", "--trials", "2", "-o", output)
    ran = cli("eval", f"{address}/v1", *options)
    assert ran.code == 0, ran.err
    assert "tiny" in ran.out
    assert EvalResults.load(output).settings["server_context"] == 512
