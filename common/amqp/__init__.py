"""RabbitMQ over aiormq: frames, connections, queues. Independent of HTTP, CSV, and what is in a message."""
