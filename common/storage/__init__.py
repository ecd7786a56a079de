"""The CSV and its journal: what makes rows durable, exactly once. Knows no broker, and of events only the header."""
