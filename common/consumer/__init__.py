"""The consumer: messages into CSV, each exactly once. Independent of the producer."""
