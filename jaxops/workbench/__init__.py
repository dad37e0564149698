"""The command `jaxops`: what an operator author asks of an operator, from a shell."""
