"""An HTTP/1.1 server: parser, responses, header fields, connections. Knows no event and no broker."""
