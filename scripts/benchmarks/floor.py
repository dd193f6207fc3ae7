"""How near a training step comes to its floor, the time that its matrix products alone take, and what holds it there.

Shapes: R rows, I inputs, O outputs of an affine map.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from typing import Any, NamedTuple

from .harness import SEED, Case, Row, Size, Table, benchmark, chosen, note, run_case, zipf_ids
from .ours import ours_step

SMALLEST_SHARE = 0.005  # of a step: operators below it are added up
NOT_WORK = {"WaitForVar", "DeleteVariable"}  # of the engine, that it spends waiting


class Product(NamedTuple):
    """An affine map (R, I) -> (R, O) of a step, taken so many times one after the other."""

    part: str
    rows: int
    inputs: int
    outputs: int
    times: int = 1


def products_of(size: Size) -> list[Product]:
    """The matrix products of a training step at the shapes in which they are computed."""
    from gluon_lm.config import CELLS
    from gluon_lm.losses import row_chunks

    model, rows = size.model, size.batch_size * size.bptt
    products, inputs = [], model.embed_size
    for width in model.layer_sizes:
        gates = CELLS[model.cell].gates * width
        products.append(Product("recurrent layers, from their inputs", rows, inputs, gates))
        products.append(Product("recurrent layers, from the state before", size.batch_size, width, gates, size.bptt))
        inputs = width
    experts = model.num_experts or 1
    if model.num_experts:
        products.append(Product("experts and priors", rows, inputs, experts * (model.embed_size + 1)))
        inputs = model.embed_size
    for chunk in row_chunks(rows, experts):
        products.append(Product("output layer", (chunk.stop - chunk.start) * experts, inputs, size.vocab_size))
    return products


def affine_map(product: Product):
    """A product's forwards and backwards, as often as a step has them."""
    import mxnet as mx

    shapes = ((product.rows, product.inputs), (product.outputs, product.inputs), (product.rows, product.outputs))
    inputs_RI, weight_OI, grad_RO = [mx.nd.random.uniform(-1, 1, shape=shape) for shape in shapes]
    inputs_RI.attach_grad()
    weight_OI.attach_grad()
    outputs_RO = mx.nd.empty(grad_RO.shape)

    def take() -> None:
        for _ in range(product.times):
            with mx.autograd.record():
                made_RO = mx.nd.FullyConnected(
                    inputs_RI, weight_OI, no_bias=True, num_hidden=product.outputs, out=outputs_RO
                )
            made_RO.backward(grad_RO)
        mx.nd.waitall()

    return take


def step_beside_products(size: Size, warmup: int, steps: int) -> dict[str, Any]:
    """Our training step and its matrix products alone, in turns: what slows the machine down meets both."""
    step = ours_step(size)
    import mxnet as mx

    from gluon_lm.data.windows import Streams

    products = products_of(size)
    takes = {product: affine_map(product) for product in products}  # those of one shape share their arrays
    ids = zipf_ids((warmup + steps) * size.batch_size * size.bptt, size.vocab_size)
    streams = Streams(ids, size.batch_size, eos=0)
    seconds_of_step, seconds_of_part = 0.0, {product.part: 0.0 for product in products}
    for i in range(warmup + steps):
        started = time.perf_counter()
        step(streams.window(i * size.bptt, size.bptt), SEED, i)
        mx.nd.waitall()
        ended = time.perf_counter()
        if i >= warmup:
            seconds_of_step += ended - started
        for product in products:
            started = time.perf_counter()
            takes[product]()
            if i >= warmup:
                seconds_of_part[product.part] += time.perf_counter() - started
    num_tokens = steps * size.batch_size * size.bptt
    return {
        "ours": num_tokens / seconds_of_step,
        "alone": num_tokens / sum(seconds_of_part.values()),
        "parts": {part: 1000 * seconds / steps for part, seconds in seconds_of_part.items()},
    }


def operators_of_ours(size: Size, warmup: int, steps: int) -> dict[str, Any]:
    """Our training step under MXNet's profiler: milliseconds of a step, and of each operator in it."""
    os.environ["MXNET_EXEC_BULK_EXEC_TRAIN"] = "0"  # joins operators of a graph, whose times would be lost
    step = ours_step(size)
    import mxnet as mx

    from gluon_lm.data.windows import Streams

    ids = zipf_ids((warmup + steps) * size.batch_size * size.bptt, size.vocab_size)
    streams = Streams(ids, size.batch_size, eos=0)
    for i in range(warmup):
        step(streams.window(i * size.bptt, size.bptt), SEED, i)
    mx.nd.waitall()
    with tempfile.TemporaryDirectory(prefix="gluon_lm-benchmark-") as folder:
        trace = os.path.join(folder, "profile.json")  # MXNet deletes a file of this name before it writes one
        mx.profiler.set_config(profile_symbolic=True, profile_imperative=True, aggregate_stats=True, filename=trace)
        mx.profiler.set_state("run")
        started = time.perf_counter()
        for i in range(warmup, warmup + steps):
            step(streams.window(i * size.bptt, size.bptt), SEED, i)
        mx.nd.waitall()
        seconds = time.perf_counter() - started
        mx.profiler.set_state("stop")
        totals = json.loads(mx.profiler.dumps(reset=True, format="json"))["Time"]["operator"]
    operators = {name: found["Total"] / steps for name, found in totals.items() if name not in NOT_WORK}
    return {"milliseconds": 1000 * seconds / steps, "operators": operators}


def operator_rows(found: dict[str, Any]) -> list[Row]:
    """The step, its operators from the longest on, and what is left of it."""
    whole, operators = found["milliseconds"], found["operators"]
    shown = {name: ms for name, ms in operators.items() if ms >= SMALLEST_SHARE * whole}
    rows = [Row("a step, under the profiler", {"milliseconds": [whole]})]
    rows += [Row(f"`{name}`", {"milliseconds": [ms]}) for name, ms in sorted(shown.items(), key=lambda it: -it[1])]
    smaller = sum(operators.values()) - sum(shown.values())
    rows.append(Row(f"{len(operators) - len(shown)} smaller operators", {"milliseconds": [smaller]}))
    rows.append(Row("no operator at work", {"milliseconds": [max(0.0, whole - sum(operators.values()))]}))
    return rows


@benchmark("floor", "A", "B", "C", "D", "demo", "openseq2seq")
def run_floor(options: argparse.Namespace) -> list[Table]:
    """The share of its matrix products' speed that training reaches, and where the rest of a step goes."""
    tables = []
    for name in options.sizes:
        size, warmup, steps = chosen(options, name)
        case = Case("a step beside its products", step_beside_products)
        rounds: list[dict[str, Any]] = []
        for n in range(options.rounds):
            found = run_case(case, options, size, warmup, steps)
            rounds.append(found)
            note(f"floor, {name} {n + 1}/{options.rounds}: {found['ours']:,.0f} of {found['alone']:,.0f} tokens/s")
        rows = [
            Row(label, {"tokens_per_second": [found[key] for found in rounds]})
            for label, key in (("gluon_lm", "ours"), ("its matrix products alone", "alone"))
        ]
        tables.append(Table(f"Floor, {name}: {size.description}", rows, ratio="share that gluon_lm reaches"))
        parts = [Row(part, {"milliseconds": [found["parts"][part] for found in rounds]}) for part in rounds[0]["parts"]]
        tables.append(Table(f"Matrix products of a step, {name}: {size.description}", parts))
        profiled = run_case(Case("profile", operators_of_ours), options, size, warmup, max(2, steps // 4))
        tables.append(Table(f"Operators of a step, {name}: {size.description}", operator_rows(profiled)))
    return tables
