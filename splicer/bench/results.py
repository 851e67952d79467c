# SPDX-License-Identifier: Apache-2.0
"""What was measured: ratios, the noise beside them, what makes a run fail; as text and as JSON.

The legs of a workload are a chain: plain, spliced, plain, spliced, ..., plain. So each spliced leg has a
plain one before and after it. Its ratio is to the mean of the two, which takes out what a machine drifts
meanwhile; the ratio of the two, the second over the first, is the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from splicer.bench.model import Metric, Sample, Splicing, Subject

TABLE_HEAD = f"{'':<31}{'plain':>7}{'spliced':>8}  {'ratio (min - max)':<18} {'p/p':<4}  redirected"


@dataclass(frozen=True)
class Leg:
    """A spliced one. With --baseline it is plain as well, and `splicing` None."""

    sample: Sample
    splicing: Splicing | None


@dataclass(frozen=True)
class Spread:
    """Some ratios, sorted."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return median(self.values)

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "min": self.values[0], "max": self.values[-1]}

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.values[0]:.2f} - {self.values[-1]:.2f})"


@dataclass(frozen=True)
class Row:
    """One metric over all legs, of which the plain ones are one more."""

    metric: Metric
    plains: Sequence[float]
    splices: Sequence[float]

    @property
    def plain(self) -> float:
        return median(self.plains)

    @property
    def spliced(self) -> float:
        return median(self.splices)

    @property
    def ratios(self) -> Spread:
        around = zip(self.plains, self.splices, self.plains[1:], strict=False)
        return Spread(sorted(_divide(2 * spliced, before + after) for before, spliced, after in around))

    @property
    def noises(self) -> Spread:
        return Spread(
            sorted(
                _divide(after, before) for before, after in zip(self.plains, self.plains[1:], strict=False)
            )
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "plain": self.plain,
            "spliced": self.spliced,
            "ratio": self.ratios.to_json(),
            "noise": self.noises.to_json(),
            "plain_samples": self.plains,
            "spliced_samples": self.splices,
        }

    @property
    def failure(self) -> str:
        """The bound, beyond the noise: the median distance of the ratios of two plain legs from 1."""
        metric, ratio = self.metric, self.ratios.median
        noise = median(abs(noise - 1) for noise in self.noises.values)
        if metric.holds(ratio, noise):
            return ""
        sign = ">=" if metric.higher_is_better else "<="
        return f"{metric.label}: {ratio:.2f}, wanted {sign} {metric.bound} with {noise:.2f} for noise"


@dataclass(frozen=True)
class Result:
    workload: Subject
    plains: Sequence[Sample]  # one more than
    splices: Sequence[Leg]

    @property
    def rows(self) -> list[Row]:
        return [self._row(metric) for metric in self.workload.metrics]

    def _row(self, metric: Metric) -> Row:
        return Row(
            metric,
            [sample.metrics[metric.key] for sample in self.plains],
            [leg.sample.metrics[metric.key] for leg in self.splices],
        )

    @property
    def splicings(self) -> list[Splicing]:
        return [leg.splicing for leg in self.splices if leg.splicing is not None]

    @property
    def samples(self) -> dict[str, Sequence[Sample]]:
        return {"plain": self.plains, "spliced": [leg.sample for leg in self.splices]}

    @property
    def shares(self) -> list[float]:
        """Of each spliced leg: bytes that were redirected of those that were sent, where that is known."""
        return [
            # The greeting of a stream is not in what was sent.
            min(1.0, leg.splicing.redirected_bytes / leg.sample.sent_bytes)
            for leg in self.splices
            if leg.splicing is not None and leg.sample.sent_bytes
        ]

    def errors(self, leg: str) -> dict[str, int]:
        total: dict[str, int] = {}
        for sample in self.samples[leg]:
            for kind, count in sample.errors.items():
                total[kind] = total.get(kind, 0) + count
        return total

    def failures(self, check: bool) -> list[str]:
        """What makes the run fail: errors and missing splices always, the bounds with --check."""
        found = [f"errors in the {leg} legs" for leg in self.samples if self.errors(leg)]
        redirected = [s.redirected_messages for s in self.splicings]
        if self.workload.expected == "spliced" and not all(redirected):
            found.append("a spliced leg redirected nothing")
        if self.workload.expected == "refused" and any(redirected):
            found.append("it was to be refused, and messages were redirected")
        if check and self.splicings:
            found += [row.failure for row in self.rows if row.failure]
        return [f"{self.workload.name}: {what}" for what in found]

    def to_json(self, check: bool) -> dict[str, Any]:
        metrics = {key: self._row(Metric(key, key)).to_json() for key in self.plains[0].metrics}
        return {
            "name": self.workload.name,
            "title": self.workload.title,
            "metrics": metrics,
            "requests": {leg: [s.requests for s in samples] for leg, samples in self.samples.items()},
            "unit": self.workload.unit,
            "redirected_share": self.shares,
            "errors": {leg: self.errors(leg) for leg in self.samples},
            "splicing": [asdict(splicing) for splicing in self.splicings],
            "failures": self.failures(check),
        }

    def to_line(self) -> str:
        """The first metric alone, for tables with a line per workload."""
        row = self.rows[0]
        line = (
            f"{self.workload.name:<31}{format_number(row.plain):>7}{format_number(row.spliced):>8}"
            f"  {row.ratios!s:<18} {row.noises.median:<4.2f}  {self._redirected_text()}"
        )
        programs = self._programs_text()
        return f"{line}\n  {programs}" if programs else line

    def _redirected_text(self) -> str:
        """What part of the spliced legs was spliced at all, so that nobody takes noise for a result."""
        if not self.splicings:
            return ""
        if not any(s.redirected_messages for s in self.splicings):
            return "none"
        if not self.shares:
            return "yes" if all(s.redirected_messages for s in self.splicings) else "in part"
        least, most = _percent(min(self.shares)), _percent(max(self.shares))
        return f"{least}%" if least == most else f"{least}-{most}%"

    def to_text(self) -> str:
        lines = ["", f"{self.workload.name}: {self.workload.title}"]
        lines.append(f"  {'':<14}{'plain':>10}{'spliced':>10}  {'ratio (min - max)':<20}plain/plain")
        for row in self.rows:
            lines.append(
                f"  {row.metric.label:<14}{format_number(row.plain):>10}{format_number(row.spliced):>10}"
                f"  {row.ratios!s:<20}{row.noises}"
            )
        for leg in self.samples:
            if errors := self.errors(leg):
                lines.append(f"  ERRORS {leg}: " + ", ".join(f"{kind} {n}" for kind, n in errors.items()))
        lines.append(f"  spliced legs: {self._splicing_text()}")
        if text := self._programs_text():
            lines.append(f"  {text}")
        return "\n".join(lines)

    def _programs_text(self) -> str:
        """Calls of each program for a request, and the time of one: medians of the legs."""
        found: dict[str, list[tuple[float, float]]] = {}
        for leg in self.splices:
            for name, cost in (leg.splicing.programs if leg.splicing else {}).items():
                if cost.calls:
                    each = cost.calls / leg.sample.requests, cost.nanoseconds / cost.calls
                    found.setdefault(name, []).append(each)
        parts, total = [], 0.0
        for name, costs in found.items():
            calls, nanoseconds = median(c for c, _ in costs), median(n for _, n in costs)
            total += calls * nanoseconds / 1000
            if calls >= 0.05:
                parts.append(f"{name} {calls:.1f} x {nanoseconds:.0f} ns")
        if not found:
            return ""
        what = ", ".join(parts) or "none"
        return f"programs, for {_article(self.workload.unit)}: {what};\n    {total:.2f} us in all"

    def _splicing_text(self) -> str:
        if not self.splicings:
            return "plain as well (--baseline)"
        messages = format_number(median(s.redirected_messages for s in self.splicings))
        passed = format_number(median(s.passed_messages for s in self.splicings))
        spliced = median(s.spliced for s in self.splicings)
        rescued = sum(s.rescued for s in self.splicings)
        percent = median(s.cpu_percent for s in self.splicings)
        rss = median(s.rss_kib for s in self.splicings) / 1024
        return (
            f"{messages} messages redirected, {passed} passed,\n    {spliced:g} connections spliced, "
            f"{rescued} rescued; daemon {percent:.1f} % CPU, {rss:.0f} MiB{self._refused_text()}"
        )

    def _refused_text(self) -> str:
        reasons = sorted({reason for s in self.splicings for reason in s.refused})
        if not reasons:
            return ""
        counts = {reason: median(s.refused.get(reason, 0) for s in self.splicings) for reason in reasons}
        return ";\n    refused: " + ", ".join(f"{reason} {count:g}" for reason, count in counts.items())


def _article(unit: str) -> str:
    return f"{'an' if unit[0] in 'aeiou' else 'a'} {unit}"


def _percent(share: float) -> str:
    """Without a sign; what is not nothing does not look like it."""
    percent = 100 * share
    return f"{percent:.0f}" if percent >= 1 or percent == 0 else "<1"


def _divide(one: float, other: float) -> float:
    """A ratio. Nothing to nothing is no change."""
    return one / other if other else float("inf") if one else 1.0


def format_number(value: float) -> str:
    """Four significant digits, thousands apart."""
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.4g}"
