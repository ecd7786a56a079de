"""The CSV and its journal, which make rows durable exactly once. Knows no broker, and of events only the header."""
