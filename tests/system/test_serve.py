"""The server as its users meet it: a process, an address, several clients."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import urlencode

import mxnet as mx
import pytest
import uvicorn
from processes import ROOT, environment, wait_until
from serving import PATIENCE, Server, train_tiny_run

from gluon_lm.export import main as export
from gluon_lm.serve import main
from gluon_lm.serving.limits import Limits
from gluon_lm.serving.schemas import RequestModels
from gluon_lm.serving.server import _protocol

URLENCODED = "application/x-www-form-urlencoded"
ENDLESS = 10**8  # words


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_tiny_run(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(run):
    limits = ("--slots", 8, "--max-words", 60, "--max-texts", 4, "--max-prompt", 300)
    with Server(run, *limits, "--root-path", "/expose/ID") as server:
        yield server


@pytest.fixture(scope="module")
def server_with_names(run):
    with Server(run, "--allowed-hosts", "lm.example") as server:
        yield server


def multipart(fields, file=None):
    """A form as ``curl -F`` sends it."""
    parts = [f'--edge\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    if file:
        parts.append(f'--edge\r\nContent-Disposition: form-data; name="{file}"; filename="f"\r\n\r\n5\r\n')
    return "".join([*parts, "--edge--\r\n"]).encode(), "multipart/form-data; boundary=edge"


def raw_request(asked):
    """The bytes of a request for text, for a client that does with its socket as it likes."""
    body = json.dumps(asked).encode()
    head = [
        "POST /v1/generate HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


# ---------------------------------------------------------------- the form


@pytest.mark.parametrize("path", ["/", "/expose/ID", "/expose/ID/", "/expose/ID/any/path"])
def test_a_form_gives_text(server, path):
    answer = server.ask("POST", path, *multipart({"words": 45, "temperature": 3}))
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert [len(line.split()) for line in answer.text.splitlines()] == [20, 20, 5]


def test_a_form_takes_a_seed_and_both_encodings(server):
    fields = {"words": 30, "seed": 7, "temperature": ""}
    first = server.ask("POST", "/", *multipart(fields))
    again = server.ask("POST", "/", urlencode(fields).encode(), URLENCODED)
    other = server.ask("POST", "/", *multipart({"words": 30}))
    assert first.text == again.text != other.text
    assert first.headers["x-seed"] == "7" != other.headers["x-seed"]


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (multipart({"temperature": 1}), "words"),
        (multipart({"words": "many"}), "words"),
        (multipart({"words": 0}), "words"),
        (multipart({"words": 61}), "60"),
        (multipart({"words": 5, "temprature": 0.1}), "temprature"),
        (multipart({"words": 5, "n": 4}), "n: "),
        (multipart({"words": 5, "temperature": 0.0009}), "temperature"),
        (multipart({"words": 5, "temperature": "nan"}), "temperature"),
        (multipart({}, file="words"), "files"),
        ((b"no form", "multipart/form-data; boundary=edge"), ""),
        ((b"--edge\r\nhalf a", "multipart/form-data; boundary=edge"), ""),
        ((b'{"words": 5}', "application/json"), "words"),
        ((b"", None), "words"),
    ],
)
def test_a_bad_form_is_refused_with_a_reason(server, form, reason):
    answer = server.ask("POST", "/", *form)
    assert answer.status == 400
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.strip() and reason in answer.text and len(answer.text.splitlines()) == 1


# ---------------------------------------------------------------- JSON


def test_texts_depend_on_seed_and_number(server):
    asked = {"prompt": "the cat", "words": 30, "n": 3, "seed": 5}
    first, again = (server.ask_json("/v1/generate", asked).json for _ in range(2))
    assert first == again and first["seed"] == 5
    words = [tuple(text["words"]) for text in first["texts"]]
    assert [len(text) for text in words] == [30] * 3 and len(set(words)) == 3
    (single,) = server.ask_json("/v1/generate", {**asked, "n": 1}).json["texts"]
    assert single == first["texts"][0]


def test_words_of_the_prompt_that_the_model_does_not_know_are_told(server):
    answer = server.ask_json("/v1/generate", {"prompt": "the zebra <unk> sees a zebra , Cat", "words": 3}).json
    assert answer["unknown"] == ["zebra", "Cat"]
    with server.stream(prompt="the zebra", words=2) as events:
        assert next(events)[1]["unknown"] == ["zebra"]


def test_without_a_seed_one_is_drawn_and_returned(server):
    asked = {"words": 30}
    first, other = (server.ask_json("/v1/generate", asked).json for _ in range(2))
    assert first["texts"] != other["texts"]
    assert server.ask_json("/v1/generate", {**asked, "seed": first["seed"]}).json == first


def test_knobs_do_what_they_say(server):
    def words(**knobs):
        asked = {"words": 60, "seed": 1, "n": 4, **knobs}
        return [text["words"] for text in server.ask_json("/v1/generate", asked).json["texts"]]

    def have(word, texts):
        return any(word in text for text in texts)

    assert have("<unk>", words()) and not have("<unk>", words(suppress_unk=True))
    ended = words(stop_at_eos=True)
    assert have("<eos>", ended) and not have("<eos>", [text[:-1] for text in ended])
    assert [text[: len(short)] for text, short in zip(words(), ended)] == ended
    greedy = words(temperature=0, prompt="the")
    assert greedy == words(top_k=1, prompt="the", seed=2) == words(top_p=1e-6, prompt="the", seed=3)
    assert greedy != words(prompt="the")


def test_a_stream_tells_the_same_words_one_by_one(server):
    asked = {"words": 25, "n": 2, "seed": 9, "prompt": "a dog"}
    whole = server.ask_json("/v1/generate", asked).json
    with server.stream(**asked) as events:
        (first, start), *middle, (last, done) = events
    assert (first, start) == ("start", {"seed": 9, "unknown": []})
    assert (last, done) == ("done", whole)
    assert {kind for kind, _ in middle} == {"word"}
    for index, text in enumerate(whole["texts"]):
        assert [word["word"] for _, word in middle if word["index"] == index] == text["words"]


def test_texts_are_the_same_alone_and_under_load(server):
    knobs = [{}, {"temperature": 0.5, "prompt": "the cat"}, {"top_k": 3}, {"top_p": 0.5, "prompt": "a " * 100}]
    requests = [{"words": 20 + n, "seed": n, "stream": False, **knobs[n % len(knobs)]} for n in range(16)]
    alone = [server.ask_json("/v1/generate", request).json for request in requests]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda request: server.ask_json("/v1/generate", request).json, requests * 2))
    assert together == alone * 2


def test_scores_add_up(server):
    answer = server.ask_json("/v1/score", {"text": "the cat sees\nnothing here"}).json
    assert [[word["word"] for word in line["words"]] for line in answer["lines"]] == [
        ["the", "cat", "sees", "<eos>"],
        ["nothing", "here", "<eos>"],
    ]
    assert [word["unknown"] for word in answer["lines"][1]["words"]] == [True, True, False]
    for line in answer["lines"]:
        total = sum(word["log_prob"] for word in line["words"])
        assert line["log_prob"] == pytest.approx(total, abs=1e-4)
        assert line["perplexity"] == pytest.approx(math.exp(-total / len(line["words"])), rel=1e-4)
    assert server.ask_json("/v1/score", {"lines": ["the cat sees", "nothing here"]}).json == answer


def test_only_a_line_feed_ends_a_line(server):
    answer = server.ask_json("/v1/score", {"text": "the\u2028cat\x0b\x85sees\r\n\na\n"}).json
    assert answer == server.ask_json("/v1/score", {"lines": ["the cat sees\n", "", "a\n"]}).json
    assert [len(line["words"]) for line in answer["lines"]] == [4, 1, 2]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/generate", {"words": 0}, "words"),
        ("/v1/generate", {"words": 61}, "words"),
        ("/v1/generate", {"words": "5"}, "words"),
        ("/v1/generate", {"n": 5}, "n"),
        ("/v1/generate", {"prompt": "x" * 301}, "prompt"),
        ("/v1/generate", {"prompt": "\ud800"}, "prompt"),
        ("/v1/generate", {"temperature": math.nan}, "temperature"),
        ("/v1/generate", {"top_p": 0}, "top_p"),
        ("/v1/generate", {"seed": -1}, "seed"),
        ("/v1/generate", {"file": "/etc/passwd"}, "file"),
        ("/v1/generate", [], "body"),
        ("/v1/score", {}, "body"),
        ("/v1/score", {"text": "a", "lines": ["b"]}, "body"),
        ("/v1/score", {"lines": ["x" * 200, "y" * 200]}, "body"),
    ],
)
def test_bad_json_is_refused_with_the_field_and_a_reason(server, path, body, field):
    answer = server.ask_json(path, body)
    assert answer.status == 422
    (problem,) = answer.json["detail"]
    assert problem["loc"][-1] == field and problem["msg"]


@pytest.mark.parametrize("body", [b'{"words"', b"\xff\xfe", b"[" * 5000, b'{"words": 1' + b"0" * 5000 + b"}", b""])
def test_what_is_no_json_is_refused(server, body):
    answer = server.ask("POST", "/v1/generate", body, "application/json")
    assert answer.status == 422 and answer.json["detail"][0]["msg"]


def test_json_that_is_not_said_to_be_json_is_refused_with_what_to_say(server):
    answer = server.ask("POST", "/v1/generate", b'{"words": 5}', URLENCODED)
    assert answer.status == 422 and "Content-Type: application/json" in answer.json["detail"][0]["msg"]


def test_what_is_too_long_or_nowhere_is_refused(server):
    assert server.ask("POST", "/v1/generate", b" " * 100_000, "application/json").status == 413
    too_long = server.ask("POST", "/", b"words=5&x=" + b"y" * 100_000, URLENCODED)
    assert too_long.status == 413 and re.fullmatch(r"the request is longer than \d+ bytes\n", too_long.text)
    assert server.ask("GET", "/nowhere").status == 404
    assert server.ask("POST", "/nowhere").status == 404
    for path, allowed in (("/v1/model", "GET, HEAD"), ("/", "GET, HEAD, POST"), ("/v1/score", "POST")):
        answer = server.ask("DELETE", path)
        assert (answer.status, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/", "/docs", "/healthz", "/v1/model", "/metrics"])
def test_head_answers_as_get_without_the_body(server, path):
    got, head = server.ask("GET", path), server.ask("HEAD", path)
    assert (head.status, head.headers["content-type"], head.text) == (200, got.headers["content-type"], "")


def test_a_slash_at_the_end_of_a_path_changes_nothing(server):
    for root in ("", "/expose/ID"):
        assert server.ask("GET", f"{root}/docs/").text == server.ask("GET", "/docs").text
        answer = server.ask_json(f"{root}/v1/generate/", {"words": 3, "seed": 1})
        assert answer.json == server.ask_json("/v1/generate", {"words": 3, "seed": 1}).json


def test_it_says_what_it_is_and_how_it_is(server):
    assert server.host == "127.0.0.1"  # nobody else is served unless asked for
    model = server.ask("GET", "/expose/ID/v1/model").json
    assert model["limits"]["max_words"] == 60 and model["description"]["model"]["cell"] == "lstm"
    assert model["description"]["training"]["run"] == "run" and model["description"]["training"]["steps"] == 3
    (loaded,) = (line for line in server.lines if line.startswith("loaded "))
    assert loaded.endswith("/run/checkpoints/step-3")
    assert server.ask("GET", "/healthz").json == {"ok": True}
    wait_until(lambda: is_idle(server))  # clients of other tests may just have left
    before = server.figure("gluon_lm_words_total")
    server.ask_json("/v1/generate", {"words": 12, "n": 2})
    assert server.figure("gluon_lm_words_total") == before + 24
    wait_until(lambda: is_idle(server))
    figures = server.ask("GET", "/metrics").text
    assert re.search(r'^gluon_lm_requests_total\{method="POST",route="/v1/generate",status="200"\} \d+$', figures, re.M)
    assert re.search(r'^gluon_lm_request_seconds_bucket\{route="/v1/generate",le="\+Inf"\} \d+$', figures, re.M)


def test_it_says_what_it_is_where_the_name_of_its_run_is_no_utf8(run):
    other = shutil.copytree(run, run.with_name("run\udce9"), symlinks=True)
    with Server(other) as server:
        assert server.ask("GET", "/v1/model").json["description"]["training"]["run"] == "run\\udce9"


def test_a_line_is_logged_for_each_request_and_none_can_be_forged(server):
    server.ask("GET", "/a%0Ab%1b")
    wait_until(lambda: any(line.startswith("127.0.0.1 GET /a%0Ab%1b 404 ") for line in server.lines))
    with socket.create_connection((server.host, server.port), PATIENCE) as client:
        client.sendall(b"GET /\x7f\xe2\x80\xa8 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while client.recv(4096):
                pass
    with socket.create_connection((server.host, server.port), PATIENCE) as client:
        forged = b"X-Forwarded-For: 9.9.9.9 GET / 200 0.001 s\x1b[31m\x85"
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + forged + b"\r\nConnection: close\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while client.recv(4096):
                pass
    wait_until(lambda: any(line.startswith("9.9.9.9?GET?/?200") for line in server.lines))
    assert all(line.isprintable() for line in server.lines)


def test_no_request_that_its_description_allows_or_forbids_makes_it_fail(server):
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--url", server.url]
    flags = ["--checks", checks, "--max-examples", "10", "--seed", "1", "--phases", "examples,coverage,fuzzing"]
    fuzz = subprocess.run(
        [*command, *flags, "--generation-database", "none"], capture_output=True, text=True, timeout=4 * PATIENCE
    )
    assert fuzz.returncode == 0, fuzz.stdout
    assert server.ask("GET", "/healthz").status == 200
    assert not [line for line in server.lines if "Traceback" in line]


def test_the_documentation_has_every_field_and_answers_as_they_are(server):
    models = RequestModels(Limits())
    fields = {**models.Generate.model_fields, **models.Score.model_fields}
    defaults = {name: "none" if not field.default else json.dumps(field.default) for name, field in fields.items()}
    defaults |= {name: "false" for name, field in fields.items() if field.default is False}
    page = (ROOT / "docs/serving.md").read_text()
    assert dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", page, re.M)) == defaults
    generated, scored, *events = map(json.loads, re.findall(r"^(?:data: )?(\{.*\})$", page, re.M))
    with server.stream(words=2) as stream:
        own_events = [data for _, data in stream]
    own = [
        server.ask_json("/v1/generate", {"words": 4, "prompt": "the zebra"}).json,
        server.ask_json("/v1/score", {"text": "the"}).json,
        *own_events,
    ]
    assert [*map(shape_of, (generated, scored, *events[:-1]))] == [*map(shape_of, own)]


def shape_of(value):
    """Names and kinds, without lengths."""
    if isinstance(value, dict):
        return {name: shape_of(one) for name, one in value.items()}
    return [shape_of(value[0])] if isinstance(value, list) and value else type(value)


# ---------------------------------------------------------------- too much, too slow, too late


def test_a_full_queue_refuses_and_a_client_that_leaves_makes_room(run):
    with Server(run, "--slots", 2, "--max-waiting", 1, "--max-words", ENDLESS, "--max-texts", 2) as server:
        with contextlib.ExitStack() as clients:
            streams = [clients.enter_context(server.stream(words=ENDLESS, seed=n)) for n in range(2)]
            for events in streams:
                assert [next(events)[0] for _ in range(3)] == ["start", "word", "word"]
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(server.ask_json, "/v1/generate", {"words": 5})
                wait_until(lambda: server.figure("gluon_lm_waiting") == 1)
                for refused in (
                    server.ask_json("/v1/generate", {"words": 5}),
                    server.ask_json("/v1/score", {"text": "the"}),
                    server.ask("POST", "/", b"words=5", URLENCODED),
                ):
                    assert refused.status == 429 and refused.headers["retry-after"] and "waiting" in refused.text
                assert not waiting.done()
                clients.close()
                assert waiting.result(PATIENCE).status == 200
        wait_until(lambda: server.figure("gluon_lm_live_texts") == 0)
        # A client that leaves without having been told anything yet.
        with socket.create_connection((server.host, server.port), PATIENCE) as client:
            client.sendall(raw_request({"words": ENDLESS}))
            wait_until(lambda: server.figure("gluon_lm_live_texts") == 1)
        wait_until(lambda: server.figure("gluon_lm_live_texts") == 0)
        wait_until(lambda: [server.num_answered(status) for status in (200, 499)] == [1, 3])
        server.process.wait_for("/v1/generate 499 ", times=3)


@pytest.mark.parametrize(
    "flags, allowed, refused",
    [
        (
            (),
            ["localhost", "LOCALHOST:80", "lm.localhost", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", ""],
            ["a.example"],
        ),
        (
            ("--allowed-hosts", "a.example, B.example"),
            ["a.example:80", "b.example", "localhost"],
            ["c.example", "[::1"],
        ),
    ],
)
def test_what_is_addressed_to_another_host_is_refused_for_it_is_from_some_page_in_a_browser(
    run, flags, allowed, refused
):
    with Server(run, *flags) as server:
        for host in allowed:
            assert server.ask("GET", "/v1/model", Host=host).status == 200, host
        for host in refused:
            answer = server.ask("GET", "/v1/model", Host=host)
            assert answer.status == 421 and "--allowed-hosts" in answer.json["detail"], host


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/", b"words=5", URLENCODED),
        ("/expose/ID/any/path", *multipart({"words": 5})),
        ("/v1/generate", b'{"words": 5}', "application/json"),
        ("/v1/score", b'{"text": "the cat"}', "application/json"),
    ],
)
def test_what_a_page_of_another_site_posts_is_refused(server, path, body, kind):
    written = server.figure("gluon_lm_words_total")
    answer = server.ask("POST", path, body, kind, **{"Sec-Fetch-Site": "cross-site"})
    assert answer.status == 403 and "another site" in answer.text
    assert server.figure("gluon_lm_words_total") == written
    assert server.ask("GET", "/", **{"Sec-Fetch-Site": "cross-site"}).status == 200  # a link leads here
    for site in ("same-origin", "same-site", "none"):
        assert server.ask("POST", path, body, kind, **{"Sec-Fetch-Site": site}).status == 200, site


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("192.0.2.7:8000", "http://192.0.2.7:8000", 200),
        ("192.0.2.7:8000", "http://192.0.2.7", 200),
        ("LM.example:8000", "http://lm.example:8000", 200),
        ("127.0.0.1:8000", "http://lm.example", 200),  # behind a proxy that addresses it so
        ("[2001:db8::7]:8000", "http://[2001:db8::7]:8000", 200),
        ("192.0.2.7:8000", "http://192.0.2.8:8000", 403),
        ("lm.example:8000", "http://evil.example", 403),
        ("lm.example:8000", "http://lm.example.evil", 403),
        ("192.0.2.7:8000", "null", 403),
        ("192.0.2.7:8000", "http://[", 403),
    ],
)
def test_over_plain_http_a_page_is_known_by_its_origin(server_with_names, host, origin, status):
    """Browsers name the site only to https and to their own machine."""
    answer = server_with_names.ask("POST", "/", b"words=5", URLENCODED, Host=host, Origin=origin)
    assert answer.status == status
    assert status == 200 or "another site" in answer.text


def test_what_takes_too_long_is_ended_and_a_slow_reader_stops_nobody(run):
    with Server(run, "--slots", 2, "--max-words", ENDLESS, "--timeout", 2) as server:
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.settimeout(PATIENCE)
            reader.connect((server.host, server.port))
            reader.sendall(raw_request({"words": ENDLESS, "stream": True}))
            assert server.ask_json("/v1/generate", {"words": 20}).status == 200
            wait_until(lambda: server.figure("gluon_lm_live_texts") == 0)
            told = b""
            while not told.endswith(b"\r\n0\r\n\r\n"):
                told += reader.recv(1 << 16) or b"the server closed the connection\r\n0\r\n\r\n"
            assert b"event: error\ndata: " in told and b"closed the connection" not in told
        late = server.ask_json("/v1/generate", {"words": ENDLESS})
        assert late.status == 503 and "2 s" in late.json["detail"]
        with server.stream(words=ENDLESS) as events:
            *_, (kind, data) = events
        assert kind == "error" and "2 s" in data["detail"]
        wait_until(lambda: [server.num_answered(status) for status in (200, 503)] == [1, 3])
        with socket.create_connection((server.host, server.port), PATIENCE) as client:
            client.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\nhalf")
            assert client.recv(4096).startswith(b"HTTP/1.1 408 ")
        wait_until(lambda: is_idle(server))
        # At shutdown, too, and with the other signal.
        with server.stream(words=ENDLESS) as events:
            assert next(events)[0] == "start"
            assert server.stop(signal.SIGINT) == 0
        assert not [line for line in server.lines if "Traceback" in line]


def test_a_signal_finishes_what_is_running_and_takes_nothing_new(run):
    words = 3000  # which take seconds, and a signal milliseconds
    with Server(run, "--slots", 1, "--max-words", words) as server:
        with server.stream(words=words) as events:
            assert next(events)[0] == "start" and next(events)[0] == "word"
            server.process.send_signal(signal.SIGTERM)
            server.process.wait_for("SIGTERM: finishing 1 text")
            wait_until(lambda: not is_listening(server))
            *_, (kind, done) = events
        assert kind == "done" and len(done["texts"][0]["words"]) == words
        assert server.process.wait(PATIENCE) == 0


def test_ctrl_c_twice_stops_at_once_and_without_a_traceback(run):
    with Server(run, "--slots", 1, "--max-words", 100_000) as server:
        with server.stream(words=100_000) as events:
            assert next(events)[0] == "start" and next(events)[0] == "word"
            with socket.create_connection((server.host, server.port), PATIENCE) as half:
                half.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\nhalf")
                server.process.send_signal(signal.SIGINT)
                server.process.wait_for("SIGINT: finishing 1 text")
                assert server.stop(signal.SIGINT) == 0
        assert not [line for line in server.lines if "Traceback" in line or "Error" in line], server.lines


def test_connections_on_which_nothing_is_asked_keep_nobody_out_and_are_closed(run):
    with Server(run, "--slots", 1, "--max-waiting", 0, "--max-texts", 1, "--timeout", 3) as server:
        with contextlib.ExitStack() as stack:
            address = (server.host, server.port)
            clients = [stack.enter_context(socket.create_connection(address, PATIENCE)) for _ in range(300)]
            clients[0].sendall(b"GET /healthz HTTP/1.1\r\nHost:")
            assert server.ask("GET", "/healthz").json == {"ok": True}
            assert [client.recv(1) for client in clients] == [b""] * 300


def test_it_goes_on_when_nobody_reads_its_log_and_ctrl_c_ends_it(run):
    """As in ``serve | tee log``: the terminal's Ctrl-C ends both."""
    words = [sys.executable, "-u", "-m", "gluon_lm.serve", str(run), "--port", "0"]
    with subprocess.Popen(
        words, env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            line = next(line for line in iter(server.stdout.readline, "") if "serving at" in line)
            server.stdout.close()
            host, port = re.search(r"//(.+):(\d+)/", line).groups()
            for _ in range(3):
                with contextlib.closing(HTTPConnection(host, int(port), timeout=PATIENCE)) as client:
                    client.request("GET", "/healthz")
                    assert client.getresponse().status == 200
            server.send_signal(signal.SIGINT)
            assert server.wait(PATIENCE) == 0
            assert server.stderr.read() == ""
        finally:
            server.kill()


def test_a_client_that_reads_nothing_of_a_long_answer_is_let_go(monkeypatch):
    monkeypatch.setattr("gluon_lm.serving.server.SECONDS_TO_SEND", 0.0)

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})

    config = uvicorn.Config(answer, http=_protocol(0.5), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        ended = pool.submit(server.run, [listener])
        with socket.create_connection(listener.getsockname(), PATIENCE) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(1)
            wait_until(lambda: not server.server_state.connections)
            server.should_exit = True
            ended.result(PATIENCE)


def is_idle(server):
    return server.figure("gluon_lm_live_texts") == server.figure("gluon_lm_waiting") == 0


def is_listening(server):
    try:
        socket.create_connection((server.host, server.port), PATIENCE).close()
    except ConnectionError:
        return False
    return True


def test_an_exported_folder_is_served_as_its_run(run, server, tmp_path):
    assert export([str(run), "--output", str(tmp_path / "exported")]) == 0
    with Server(tmp_path / "exported", "--slots", 8) as exported:
        for path, asked in [
            ("/v1/generate", {"words": 20, "n": 2, "seed": 3, "prompt": "the cat"}),
            ("/v1/generate", {"words": 20, "temperature": 0}),
        ]:
            assert exported.ask_json(path, asked).json["texts"] == server.ask_json(path, asked).json["texts"]
        own, theirs = (one.ask_json("/v1/score", {"text": "the cat sees"}).json["lines"] for one in (exported, server))
        assert own[0]["log_prob"] == pytest.approx(theirs[0]["log_prob"], rel=1e-5)


# ---------------------------------------------------------------- before it serves


def problem_of(capsys, *flags):
    assert main([*map(str, flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_port_in_use_is_said_in_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot listen there" in problem_of(capsys, "run", "--port", port)


def test_an_address_that_is_none_is_said_in_one_line(capsys):
    assert "--host a..b: is not an address of this machine" in problem_of(capsys, "run", "--host", "a..b")


def test_an_engine_that_cannot_start_is_said_in_one_line(run, capsys, monkeypatch):
    def fail(predictor, num_streams):
        raise mx.MXNetError("Memory allocation failed: out of memory")

    monkeypatch.setattr("gluon_lm.prediction.ModelPredictor.begin_state", fail)
    problem = problem_of(capsys, run, "--port", 0)
    assert problem.startswith("error: out of memory (")
    assert "serving at" not in capsys.readouterr().out


def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch):
    monkeypatch.setattr("gluon_lm.serve.find_spec", lambda name: None)
    line = problem_of(capsys, "run")
    assert "fastapi" in line and "gluon_lm[serve]" in line


def test_flags_that_cannot_be_are_refused(capsys):
    assert "--root-path" in problem_of(capsys, "run", "--root-path", "expose")
    assert "--max-texts" in problem_of(capsys, "run", "--slots", 2, "--max-waiting", 1, "--max-texts", 4)


def test_the_load_test_measures_a_server_and_stops_it(run):
    words = [ROOT / "scripts/load_test.py", run, "--clients", 3, "--requests", 6, "--words", 4, "--soak", 20]
    measured = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert measured.returncode == 0, measured.stderr
    rows = [line.split() for line in measured.stdout.splitlines()]
    one, three = (next(row for row in rows if row[:1] == [clients]) for clients in ("1", "3"))
    assert float(one[2]) > 0 and three[1] == "6" and float(three[2]) > 0
    assert "memory after 10 %" in measured.stdout
