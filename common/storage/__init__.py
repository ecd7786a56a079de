"""The CSV and its journal, which make rows durable exactly once. Independent of the broker; of events it knows the header."""
