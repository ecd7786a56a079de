"""Dead letters: what one looks like, how it gets there, and the commands that show and replay them."""
