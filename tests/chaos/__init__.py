"""The proof of the promise: real processes are killed under load, then the answers are compared with the CSV."""
