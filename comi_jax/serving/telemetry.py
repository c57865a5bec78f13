"""The figures of a server in Prometheus' text format, with vLLM's names behind the prefix ``comi:`` where they mean the
same. A figure holds counts, times and sizes, and never a text."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
RATES = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0)


class Telemetry:
    """The figures of one server, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.running = self._gauge("num_requests_running", "Requests that are being answered.")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for a slot.")
        self.succeeded = self._counter("request_success", "Answers, by how they ended.", "finished_reason")
        self.refused = self._counter("refused", "Requests that got an error, by its code.", "reason")
        self.cancelled = self._counter("cancelled", "Requests whose client left before the end.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of contexts and questions.")
        self.cached_tokens = self._counter("cached_tokens", "Context tokens of stored documents, not encoded again.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.first_token = self._seconds("time_to_first_token_seconds", "From arrival to the first token.")
        self.latency = self._seconds("e2e_request_latency_seconds", "From arrival to the last token.")
        self.queued = self._seconds("request_queue_time_seconds", "From arrival to the start of the work.")
        self.between_tokens = self._seconds("inter_token_latency_seconds", "Between two tokens of an answer.")
        self.encode = self._seconds("encode_seconds", "Encoding the texts of a request or an upload.")
        self.compress = self._seconds("compress_seconds", "Compressing a context for its question.")
        self.achieved_rate = self._histogram("achieved_rate", "Context tokens per memory vector.", RATES)
        self.store_bytes = self._gauge("document_store_bytes", "Bytes of the stored documents.")
        self.store_documents = self._gauge("document_store_documents", "Number of stored documents.")
        self.evictions = self._counter("document_store_evictions", "Stored documents that expired.")

    def text(self) -> bytes:
        """All figures, as Prometheus scrapes them."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"comi:{name}", about, registry=self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"comi:{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"comi:{name}", about, buckets=buckets, registry=self.registry)

    def _seconds(self, name: str, about: str) -> Histogram:
        return self._histogram(name, about, SECONDS)
