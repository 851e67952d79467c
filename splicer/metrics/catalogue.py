# SPDX-License-Identifier: Apache-2.0
"""All metrics: name, type, labels, and one sentence each. docs/metrics.md has the same table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from splicer.metrics.histogram import Distribution

Kind = Literal["counter", "gauge", "histogram"]
Samples = list[tuple[tuple[str, ...], float | Distribution]]
"""Values of the labels, and the number."""
Reading = Mapping[str, Samples]
"""By the metric's name. What is not known now is not in it."""


@dataclass(frozen=True)
class Metric:
    """`name` as it is on the page, with `_total` for a counter."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


_PARTIES = ("client", "server")

METRICS: tuple[Metric, ...] = (
    Metric(
        "splicer_build_info",
        "gauge",
        "Always 1; the labels say which splicer this is, and how it runs.",
        ("version", "kernel_class", "fionread", "adoption"),
    ),
    Metric("splicer_healthy", "gauge", "1 if the daemon's loop turns and the policy is in the kernel."),
    Metric("splicer_paused", "gauge", "1 while splicer pause keeps everything plain."),
    Metric("splicer_connections", "gauge", "Local connections now, by state.", ("state",)),
    Metric(
        "splicer_redirected_bytes_total",
        "counter",
        "Bytes of applications that were redirected, both ways.",
        _PARTIES,
    ),
    Metric(
        "splicer_redirected_messages_total",
        "counter",
        "Messages that were redirected: what one send has sent, or up to 32 KiB of it.",
        _PARTIES,
    ),
    Metric(
        "splicer_plain_bytes_total",
        "counter",
        "Bytes of local connections that TCP has carried, both ways.",
        _PARTIES,
    ),
    Metric(
        "splicer_closed_plain_bytes_total",
        "counter",
        "Those of connections that have closed, by why they were not spliced then; spliced: they were.",
        ("reason",),
    ),
    Metric(
        "splicer_passed_messages_total",
        "counter",
        "Messages of spliced connections that went through TCP all the same.",
    ),
    Metric("splicer_paired_connections_total", "counter", "Connections that were found to be local."),
    Metric("splicer_closed_connections_total", "counter", "Local connections that have closed."),
    Metric("splicer_adoptions_total", "counter", "Connections that were spliced, each time they were."),
    Metric(
        "splicer_drains_total", "counter", "Connections that went back to plain TCP, by why.", ("reason",)
    ),
    Metric("splicer_refusals_total", "counter", "Times a connection was not spliced, by why.", ("reason",)),
    Metric(
        "splicer_rescues_total",
        "counter",
        "Ends with bytes that waited unread, and went back to plain TCP; this should stay 0.",
    ),
    Metric(
        "splicer_lost_events_total",
        "counter",
        "Events of the programs that found no room in the ring buffer; what they told of is found later.",
    ),
    Metric("splicer_table_entries", "gauge", "Entries of a table in the kernel.", ("table",)),
    Metric("splicer_table_capacity", "gauge", "Entries that there can be.", ("table",)),
    Metric(
        "splicer_room_exhausted",
        "gauge",
        "1 if the next connection of somebody would not be followed, for want of room.",
    ),
    Metric(
        "splicer_loop_turn_seconds",
        "histogram",
        "How long turns of the daemon's loop take, from what woke it to its next sleep.",
    ),
    Metric("splicer_sweep_seconds", "histogram", "How long sweeps take, over the sockets of namespaces."),
    Metric("splicer_watch_seconds", "histogram", "How long looks at spliced connections take."),
    Metric(
        "splicer_held_namespaces",
        "gauge",
        "Network namespaces that no sweep can visit, since a reader there sits in a page fault.",
    ),
    Metric(
        "splicer_policy_lag_seconds",
        "gauge",
        "For how long the policy in the kernel is behind what is wanted; 0 while it is not.",
    ),
    Metric("splicer_bad_labels", "gauge", "Labels of containers that could not be read."),
    Metric(
        "splicer_docker_up", "gauge", "1 if the container engine is connected; not there with docker off."
    ),
    Metric("splicer_containers", "gauge", "Running containers that are known; not there with docker off."),
    Metric("splicer_start_time_seconds", "gauge", "When the programs were loaded, since the epoch."),
    Metric(
        "splicer_program_runs_total",
        "counter",
        "Runs of a program; only there while kernel.bpf_stats_enabled is 1.",
        ("program",),
    ),
    Metric(
        "splicer_program_run_seconds_total",
        "counter",
        "Time spent in a program; only there while kernel.bpf_stats_enabled is 1.",
        ("program",),
    ),
)

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
