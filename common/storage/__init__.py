"""The CSV and its journal, which make rows durable exactly once. Independent of the broker, and of events."""
