"""The web application: a form, a JSON API, a page.

Handlers are coroutines of one event loop. They pass work to the engine and wait for its futures.

FastAPI reads the handlers' annotations when they are defined, so annotations are not postponed here.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Optional, Union

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Match

from .. import __version__
from ..data.tokenizers import TOKENIZERS, words_of
from ..generation import WORDS_PER_LINE, lines_of
from ..generation.detokenize import detokenize
from ..generation.sampling import Sampling
from ..prediction import Predictor
from . import schemas
from .engine import Busy, Closed, Engine, TextRequest
from .guard import OUTCOME, WORK, Guard, error_response
from .limits import Limits
from .metrics import RequestMetrics

_HERE = Path(__file__).parent
_ONLY_THIS_SERVER = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; form-action 'self'; base-uri 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_Responses = dict[Union[int, str], dict[str, Any]]
_REFUSALS = {
    403: "The request is from a page of another site.",
    408: "The request came too slowly.",
    413: "The request is too long.",
    421: "The request is addressed to a host name that is not the server's.",
    429: "Too much is waiting already; try again later.",
    503: "The server is stopping, or the request timed out.",
}
_PROBLEMS: _Responses = {
    **{status: {"model": schemas.Problem, "description": what} for status, what in _REFUSALS.items()},
    422: {"model": schemas.FieldProblems, "description": "Something is wrong with the request."},
}
_FORM_ANSWERS: _Responses = {
    status: {"description": what, "content": {"text/plain": {"schema": {"type": "string"}}}}
    for status, what in {
        200: f"The text, {WORDS_PER_LINE} words a line.",
        400: "Something is wrong with the form.",
        **_REFUSALS,
    }.items()
}
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON"}},
    "required": ["data"],
}


def create_app(
    predictor: Predictor,
    limits: Optional[Limits] = None,
    root_path: Optional[str] = None,
    allowed_hosts: Optional[Iterable[str]] = None,
) -> FastAPI:
    """The application that serves a model.

    Parameters
    ----------
    predictor : Predictor
        Only the application may use it from now on.
    limits : Limits, optional
    root_path : str, optional
        Where a proxy puts the application, such as ``/expose/ID``. Paths may have this prefix or not; a form may be
        sent to any path below it.
    allowed_hosts : iterable of str, optional
        As of `gluon_lm.serving.guard.Guard`.

    Returns
    -------
    FastAPI
        Its engine runs from the application's startup to its shutdown.
    """
    limits = limits or Limits()
    root_path = None if root_path is None else root_path.rstrip("/")
    engine = Engine(predictor, limits.slots, limits.max_waiting)
    metrics = RequestMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield  # until every request has been answered, or has timed out

    app = FastAPI(
        title="gluon_lm",
        version=__version__,
        description="Writes and scores text with a word-level language model.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        servers=[{"url": root_path}] if root_path else None,
    )
    app.state.engine = engine
    app.add_middleware(
        Guard,
        metrics=metrics,
        max_body=limits.max_body,
        timeout=limits.timeout,
        root_path=root_path,
        post_paths=frozenset({"/v1/generate", "/v1/score"}),
        allowed_hosts=None if allowed_hosts is None else frozenset(allowed_hosts),
    )
    _answer_errors(app, limits)

    served = _Served(predictor, engine, limits)
    models = schemas.RequestModels(limits)
    _add_form(app, served, models)
    _add_generation(app, served, models)
    _add_scoring(app, served, models)
    _add_status(app, served, metrics)
    _add_page(app, "/", "page.html", "A page to write text with", root_path)
    _add_page(app, "/docs", "docs.html", "This description, to read", root_path)
    return app


@dataclass(frozen=True)
class _Served:
    """What the handlers need to answer requests."""

    predictor: Predictor
    engine: Engine
    limits: Limits

    async def result(self, futures: Iterable[Any]) -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, futures)), self.limits.timeout)

    def prompt_of(self, asked: Any) -> Optional[list[str]]:
        return None if asked.prompt is None else words_of(asked.prompt, self.predictor.tokenizer)


def _text_requests(asked: Any, prompt: Optional[list[str]], seed: int, num_texts: int) -> list[TextRequest]:
    sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.suppress_unk)
    return [TextRequest(asked.words, sampling, seed, index, prompt, asked.stop_at_eos) for index in range(num_texts)]


def _add_form(app: FastAPI, served: _Served, models: schemas.RequestModels) -> None:
    """Text for a form."""

    @app.post(
        "/",
        summary="Write text, as a form asks for it",
        response_class=PlainTextResponse,
        responses=_FORM_ANSWERS,
        openapi_extra={"requestBody": {"required": True, "content": _form_content(models.Form)}},
    )
    async def write_for_form(request: Request) -> PlainTextResponse:
        try:
            asked = models.Form.model_validate(await _read_form(request))
        except ValidationError as error:
            raise HTTPException(400, "; ".join(map(_in_words, error.errors()))) from None
        seed = _seed_of(asked)
        request.scope[WORK] += served.engine.generate(_text_requests(asked, served.prompt_of(asked), seed, 1))
        (words,) = await served.result(request.scope[WORK])
        text = "".join(f"{line}\n" for line in lines_of(words))
        return PlainTextResponse(text, headers={"X-Seed": str(seed), "X-Content-Type-Options": "nosniff"})


def _add_generation(app: FastAPI, served: _Served, models: schemas.RequestModels) -> None:
    """Texts, whole or word by word."""

    @app.post(
        "/v1/generate",
        summary="Write text",
        response_model=schemas.GenerateAnswer,
        responses={
            **_PROBLEMS,
            200: {
                "description": "The texts; with `stream`, events: `start` with `seed` and `unknown`, a `data` line "
                "with `index` and `word` for each word, `done` with the whole answer, or `error` with the reason.",
                "content": {"text/event-stream": {"schema": _EVENT}},
            },
        },
    )
    async def generate(request: Request, asked: models.Generate) -> Any:  # type: ignore[name-defined]
        seed = _seed_of(asked)
        prompt = served.prompt_of(asked)
        requests = _text_requests(asked, prompt, seed, asked.n)
        given = {"seed": seed, "unknown": served.predictor.vocabulary.unknown(prompt or [])}
        if not asked.stream:
            request.scope[WORK] += served.engine.generate(requests)
            return given | _texts(await served.result(request.scope[WORK]))
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        events = _events(served, request, requests, given)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def _events(
    served: _Served, request: Request, requests: list[TextRequest], given: dict[str, Any]
) -> AsyncIterator[str]:
    """Have texts written; returns the events that report them, from what is `given` at the start to the end."""
    loop, written = asyncio.get_running_loop(), asyncio.Queue()  # type: ignore[var-annotated]

    def on_word(index: int, word: str) -> None:
        loop.call_soon_threadsafe(written.put_nowait, {"index": index, "word": word})

    request.scope[WORK] += served.engine.generate(requests, on_word)
    texts = asyncio.ensure_future(served.result(request.scope[WORK]))

    def end(texts: asyncio.Future[Any]) -> None:
        if not texts.cancelled():
            texts.exception()  # otherwise asyncio complains that nobody has retrieved it
        written.put_nowait(None)

    texts.add_done_callback(end)

    async def events() -> AsyncIterator[str]:
        yield _event(given, "start")
        is_open = True
        while is_open:
            words = [await written.get()]
            while not written.empty():
                words.append(written.get_nowait())
            is_open = None not in words  # on a time-out, a word that was being written may come after it
            yield "".join(_event(word) for word in words if word is not None)
        error = texts.exception()
        if error is None:
            yield _event(given | _texts(texts.result()), "done")
        else:
            request.scope[OUTCOME], reason = _refusal(error, served.limits)
            yield _event({"detail": reason}, "error")

    return events()


def _add_scoring(app: FastAPI, served: _Served, models: schemas.RequestModels) -> None:
    """Log-probabilities of lines."""

    @app.post(
        "/v1/score",
        summary="Log-probabilities of lines, each on its own",
        response_model=schemas.ScoreAnswer,
        responses=_PROBLEMS,
    )
    async def score(request: Request, asked: models.Score) -> Any:  # type: ignore[name-defined]
        lines = asked.lines or asked.text.removesuffix("\n").split("\n")  # no other character ends a line
        tokenize = TOKENIZERS[served.predictor.tokenizer]
        request.scope[WORK].append(served.engine.score([tokenize(line) for line in lines]))
        (scores,) = await served.result(request.scope[WORK])
        return {"lines": [score.as_json() for score in scores]}


def _add_status(app: FastAPI, served: _Served, metrics: RequestMetrics) -> None:
    """What is served, whether it works, and its metrics."""
    predictor, engine, limits = served.predictor, served.engine, served.limits

    @app.get("/v1/model", summary="What is served", response_model=schemas.ModelAnswer)
    async def model() -> Any:
        return {
            "version": __version__,
            "tokenizer": predictor.tokenizer,
            "vocab_size": len(predictor.vocabulary),
            "description": predictor.describe(),
            "limits": vars(limits),
        }

    @app.get("/healthz", summary="Whether it works", response_model=schemas.Health, responses={503: _PROBLEMS[503]})
    async def healthz() -> Any:
        if not engine.is_alive:
            raise HTTPException(503, "the engine has stopped")
        return {"ok": True}

    @app.get("/readyz", summary="Whether it takes work", response_model=schemas.Health, responses={503: _PROBLEMS[503]})
    async def readyz() -> Any:
        if not engine.is_ready:
            raise HTTPException(503, "the engine is starting, stopping or full")
        return {"ok": True}

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def show_metrics() -> PlainTextResponse:
        figures = {
            "gluon_lm_words_total": ("counter", "Words written.", engine.num_words),
            "gluon_lm_live_texts": ("gauge", "Texts that have a slot.", engine.num_live),
            "gluon_lm_waiting": ("gauge", "Texts and scorings that wait for their turn.", engine.num_waiting),
            "gluon_lm_slots": ("gauge", "Texts that can have a slot.", engine.num_slots),
        }
        return PlainTextResponse(metrics.render(figures), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI, path: str, file: str, summary: str, root_path: Optional[str]) -> None:
    """A page from a file in this folder, with its links below `root_path`."""
    base = f'<base href="{escape(root_path or "")}/">'
    page = (_HERE / file).read_text(encoding="utf-8").replace('<base href="/">', base)

    @app.get(path, summary=summary, response_class=HTMLResponse, name=file)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_ONLY_THIS_SERVER)


# ---------------------------------------------------------------- what is asked for


async def _read_form(request: Request) -> dict[str, str]:
    """A form's fields that are not empty; one with a file in it is refused by the parser."""
    try:
        form = await request.form(max_files=0, max_fields=50)
    except (ValueError, LookupError) as error:
        raise HTTPException(400, "the form cannot be read") from error
    return {name: value for name, value in form.items() if isinstance(value, str) and value}


def _form_content(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {kind: {"schema": schema} for kind in ("multipart/form-data", "application/x-www-form-urlencoded")}


def _seed_of(asked: Any) -> int:
    return secrets.randbelow(2**31) if asked.seed is None else asked.seed


# ---------------------------------------------------------------- what is answered


def _texts(texts: list[list[str]]) -> dict[str, Any]:
    return {"texts": [{"text": detokenize(words), "words": words} for words in texts]}


def _event(data: dict[str, Any], kind: Optional[str] = None) -> str:
    head = "" if kind is None else f"event: {kind}\n"
    return f"{head}data: {json.dumps(data)}\n\n"


# ---------------------------------------------------------------- errors


def _answer_errors(app: FastAPI, limits: Limits) -> None:
    """Answer every error as the guard does."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Any) -> Response:
        # The answer does not repeat what was sent: JSON or UTF-8 may not be able to express it.
        keys = ("loc", "msg", "type")
        problems = [{key: problem[key] for key in keys} for problem in error.errors()]
        is_unread = all(tuple(problem["loc"]) == ("body",) for problem in problems)
        if is_unread and "json" not in request.headers.get("content-type", "").lower():
            problems = [{"loc": ["body"], "msg": "send JSON, with Content-Type: application/json", "type": "json_type"}]
        return error_response(request.scope, 422, problems)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: Any) -> Response:
        if error.status_code == 400 and request.scope["path"] != "/":  # FastAPI's answer to an unreadable body
            return error_response(
                request.scope, 422, [{"loc": ["body"], "msg": str(error.detail), "type": "json_invalid"}]
            )
        headers = {"Allow": _methods_of(app, request)} if error.status_code == 405 else error.headers
        return error_response(request.scope, error.status_code, error.detail, headers)

    async def not_done(request: Request, error: Exception) -> Response:
        status, reason = _refusal(error, limits)
        return error_response(request.scope, status, reason, {"Retry-After": "1"})

    for kind in (Busy, Closed, asyncio.TimeoutError):
        app.add_exception_handler(kind, not_done)


def _methods_of(app: FastAPI, request: Request) -> str:
    """The methods of all routes of a path; HEAD is added to GET, because the guard answers it."""
    routes = (route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE)
    methods = {method for route in routes for method in getattr(route, "methods", None) or ()}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


def _refusal(error: BaseException, limits: Limits) -> tuple[int, str]:
    if isinstance(error, Busy):
        return 429, f"{limits.capacity} texts are being written or waiting already; try again later"
    if isinstance(error, Closed):
        return 503, str(error)
    if isinstance(error, asyncio.TimeoutError):
        return 503, f"not done within {limits.timeout:g} s; ask for less, or try again later"
    return 500, "internal error; the server's log has the details"


def _in_words(problem: Any) -> str:
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
