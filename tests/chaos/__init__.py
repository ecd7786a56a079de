"""The proof of the promise: real processes are killed under load, then what was answered is compared with the CSV."""
