"""The consumer: messages into CSV, each exactly once. Knows nothing of the producer."""
