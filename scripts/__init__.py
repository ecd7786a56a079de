"""What `make` runs: set-up, the foreground run. Standard library only: it runs before anything is installed."""
