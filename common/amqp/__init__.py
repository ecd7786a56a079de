"""RabbitMQ over aiormq: frames, connections, queues. Knows no HTTP, no CSV, and nothing of what is in a message."""
