"""Counts and times of requests, in the text format that Prometheus reads."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class RequestMetrics:
    """Requests by route and status, and how long they took by route."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, int]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}

    def add(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered; `route` is the pattern that matched, of which there are few."""
        self._counts[method, route, status] += 1
        buckets = self._buckets.setdefault(route, [0] * (len(_BUCKETS) + 1))
        buckets[bisect.bisect_left(_BUCKETS, seconds)] += 1
        self._seconds[route] = self._seconds.get(route, 0.0) + seconds

    def render(self, figures: Mapping[str, tuple[str, str, float]]) -> str:
        """All metrics as text.

        Parameters
        ----------
        figures : mapping
            Further metrics, by name: type (``gauge`` or ``counter``), help and value.
        """
        lines = []
        for name, (kind, what, value) in figures.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}", f"{name} {value:.15g}"]
        name = "gluon_lm_requests_total"
        lines += [f"# HELP {name} Requests answered.", f"# TYPE {name} counter"]
        for (method, route, status), count in sorted(self._counts.items()):
            lines.append(f'{name}{{method="{method}",route="{route}",status="{status}"}} {count}')
        name = "gluon_lm_request_seconds"
        lines += [f"# HELP {name} Time from a request's head to its answer's end.", f"# TYPE {name} histogram"]
        for route, buckets in sorted(self._buckets.items()):
            total = 0
            for bound, count in zip([*map(str, _BUCKETS), "+Inf"], buckets):
                total += count
                lines.append(f'{name}_bucket{{route="{route}",le="{bound}"}} {total}')
            lines += [
                f'{name}_sum{{route="{route}"}} {self._seconds[route]:.6f}',
                f'{name}_count{{route="{route}"}} {total}',
            ]
        return "".join(f"{line}\n" for line in lines)
