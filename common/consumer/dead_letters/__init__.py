"""Dead letters: their format, their way to the broker, and the commands that show, export and replay them."""
