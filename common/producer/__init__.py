"""The producer: events over HTTP, each published with a confirm. Knows nothing of the consumer."""
