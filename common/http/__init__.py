"""An HTTP/1.1 server: parser, responses, header fields, connections. Independent of events and brokers."""
