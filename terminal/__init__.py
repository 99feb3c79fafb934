"""The terminal client: its command line, its session, its display. Uses the client library and the parser."""
