"""The metrics of the consumer."""

from __future__ import annotations

from common import __version__
from common.consumer.prepare import POISON_KINDS
from common.metrics import BATCH_ROWS, LATENCY_SECONDS, Metrics


class Counters:
    """The consumer's metrics."""

    def __init__(self) -> None:
        self.metrics = m = Metrics()
        self.deliveries = m.counter("predlog_deliveries_total", "Messages delivered by the broker.")
        self.redeliveries = m.counter("predlog_redeliveries_total", "Messages that the broker delivered again.")
        self.duplicates = m.counter(
            "predlog_duplicates_total", "Events dropped because their rows are already in the CSV."
        )
        self.dead_letters = {
            kind: m.counter("predlog_dead_letters_total", "Events that became dead letters, by reason.", reason=kind)
            for kind in POISON_KINDS
        }
        self.rows = m.counter("predlog_rows_total", "Rows committed to the CSV.")
        self.batch_rows = m.histogram("predlog_batch_rows", "Rows in a batch.", BATCH_ROWS)
        self.write_seconds = m.histogram("predlog_write_seconds", "Time to write a batch to the CSV.", LATENCY_SECONDS)
        self.fsync_seconds = m.histogram("predlog_fsync_seconds", "Time to sync the CSV to the disk.", LATENCY_SECONDS)
        self.commit_seconds = m.histogram(
            "predlog_commit_seconds", "Time to commit a batch to the journal.", LATENCY_SECONDS
        )
        self.store_failures = m.counter("predlog_store_failures_total", "Attempts to store a batch that failed.")
        self.unacked = m.gauge("predlog_unacked", "Messages delivered and not yet acked.")
        self.oldest_unacked = m.gauge("predlog_oldest_unacked_seconds", "Age of the oldest unacked message.", max)
        self.csv_bytes = m.gauge("predlog_csv_bytes", "Committed size of the CSV.")
        self.store_ok = m.gauge("predlog_store_ok", "1 while batches can be stored.", min)
        self.active = m.gauge("predlog_active", "1 while this consumer owns the CSV, 0 on standby.")
        self.connected = m.gauge("predlog_amqp_connected", "1 while connected to the broker.", min)
        self.stalled = m.gauge("predlog_stalled", "1 while work waits without progress.", max)
        self.dead_letters_bytes = m.gauge("predlog_dead_letters_bytes", "Size of the dead-letter file.")
        self.unserved = m.gauge("predlog_unserved_messages", "Messages that wait in queues that no consumer serves.")
        self.start_time = m.gauge("process_start_time_seconds", "Start of the process, Unix time.", max)
        self.reconnects = m.counter("predlog_amqp_reconnects_total", "Lost connections to the broker.")
        m.values[m.gauge("predlog_info", "Version and process.", max, version=__version__, process="consumer")] = 1.0
