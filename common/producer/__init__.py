"""The producer: events over HTTP, each published with a confirm. Independent of the consumer."""
