"""The metrics of the producer."""

from __future__ import annotations

from collections.abc import Sequence

from common import __version__
from common.http.tokens import Token
from common.metrics import LATENCY_SECONDS, Metrics
from common.producer.routes import LABELS, OTHER

STATUSES = (200, 204, 207, 400, 401, 403, 404, 405, 408, 413, 414, 415, 417, 422, 431, 500, 501, 503, 504, 505)
_REFUSALS = ("broker_away", "broker_blocked", "window_full", "nacked", "stalled", "partition_down", "shutting_down")


class Counters:
    """The producer's metrics. Their layout is fixed, so that workers can share memory."""

    def __init__(self, partitions: int = 1, tokens: Sequence[Token] = ()) -> None:
        self.metrics = m = Metrics()
        self.requests = {
            route: {
                status: m.counter("predlog_http_requests_total", "Requests answered.", route=route, status=str(status))
                for status in STATUSES
            }
            for route in LABELS
        }
        self.token_requests = {
            name: m.counter("predlog_token_requests_total", "Requests with a known token, by its owner.", token=name)
            for name in dict.fromkeys((*(token.name for token in tokens), OTHER))  # OTHER: those added by a reload
        }
        self.refusals = {
            reason: m.counter("predlog_refusals_total", "Events refused for now (503), by reason.", reason=reason)
            for reason in _REFUSALS
        }
        self.request_seconds = m.histogram(
            "predlog_http_request_seconds", "Time from the last byte of a POST to its answer.", LATENCY_SECONDS
        )
        self.confirm_seconds = m.histogram(
            "predlog_confirm_seconds", "Time from publish to the broker's confirm.", LATENCY_SECONDS
        )
        self.events = m.counter("predlog_events_total", "Events confirmed by the broker.")
        self.messages = m.counter("predlog_messages_total", "AMQP messages confirmed by the broker.")
        self.predictions = m.counter("predlog_predictions_total", "Predictions in the events confirmed by the broker.")
        self.event_bytes = m.counter("predlog_event_bytes_total", "Bytes of the events confirmed by the broker.")
        self.unconfirmed = m.gauge("predlog_unconfirmed", "Events sent to the broker and not yet confirmed.")
        self.unconfirmed_bytes = m.gauge("predlog_unconfirmed_bytes", "Bytes of the events not yet confirmed.")
        self.connected = m.gauge(
            "predlog_amqp_connected", "1 while connected to the broker (with several workers, the least).", min
        )
        self.blocked = m.gauge("predlog_amqp_blocked", "1 while the broker takes no messages.", max)
        self.stalled = m.gauge("predlog_stalled", "1 while the broker confirms no events.", max)
        self.partitions_up = [
            m.gauge("predlog_partition_up", "1 while the partition takes events.", min, partition=str(partition))
            for partition in range(partitions)
            if partitions > 1
        ]
        self.reconnects = m.counter("predlog_amqp_reconnects_total", "Lost connections to the broker.")
        self.connections = m.gauge("predlog_http_connections", "Open client connections.")
        self.start_time = m.gauge("process_start_time_seconds", "Start of the process, Unix time.", max)
        m.values[m.gauge("predlog_info", "Version and process.", max, version=__version__, process="producer")] = 1.0
